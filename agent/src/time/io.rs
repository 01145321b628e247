//! The clock and the socket: asking time servers and HTTP servers, reading, setting and slewing `CLOCK_REALTIME`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, Timespec};

use super::discipline::{self, BUILT_S, Sample};
use super::sntp::{self, LENGTH, NoReply, Reply};
use crate::transport::Transport;

/// How often each server is asked before it counts as silent, and how long for.
const ATTEMPTS: u8 = 3;
const ATTEMPT: Duration = Duration::from_secs(1);
/// Longest wait for an HTTP server's head.
const WEB_PATIENCE: Duration = Duration::from_secs(5);
/// Nanoseconds of a second.
const SECOND: i128 = 1_000_000_000;

/// Our clock, nanoseconds since 1970.
#[must_use]
pub fn now_ns() -> i128 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * SECOND + i128::from(now.tv_nsec)
}

/// Sets the clock to when this program was built, where it stands before that; what was wrong then.
#[must_use]
pub fn not_before_build() -> Option<String> {
    let behind = BUILT_S * SECOND - now_ns();
    if behind <= 0 {
        return None;
    }
    let seconds = behind / SECOND;
    Some(match step(behind) {
        Ok(()) => format!("the clock was {seconds} s before this Layer0 was built: set to that"),
        Err(error) => format!("the clock is {seconds} s before this Layer0 was built: {error}"),
    })
}

/// Sets the clock this far ahead, or back.
///
/// # Errors
/// What clock_settime(2) says.
pub fn step(by: i128) -> std::io::Result<()> {
    let time = now_ns().saturating_add(by);
    let out_of_range = |_| std::io::Error::from(std::io::ErrorKind::InvalidInput);
    let tv_sec = i64::try_from(time.div_euclid(SECOND)).map_err(out_of_range)?;
    let tv_nsec = i64::try_from(time.rem_euclid(SECOND)).map_err(out_of_range)?;
    Ok(rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?)
}

/// Lets the kernel bring the clock this far ahead, or back, without a jump.
///
/// # Errors
/// What adjtime(3) says.
pub fn slew(by: i128) -> std::io::Result<()> {
    crate::sys::clock::adjust(i64::try_from(by / 1000).unwrap_or(0))
}

/// Asks these servers, all at once, and gives the answer that is taken and whose it is. A server that says so is added to those
/// that are left alone.
///
/// # Errors
/// Why there is none: one sentence.
pub fn query(
    servers: &[SocketAddr],
    refused: &mut Vec<IpAddr>,
) -> Result<(SocketAddr, Sample), String> {
    let all_v4 = servers.iter().all(SocketAddr::is_ipv4);
    // A socket of IPv6 cannot be had where the kernel has none.
    let any: IpAddr =
        if all_v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).map_err(|error| format!("UDP socket: {error}"))?;
    let mut asked: Vec<Asked> = servers.iter().map(|server| Asked::new(*server)).collect();
    for _ in 0..ATTEMPTS {
        for one in asked.iter_mut().filter(|one| one.is_open()) {
            one.ask(&socket, all_v4);
        }
        listen(&socket, &mut asked)?;
        if asked.iter().all(|one| !one.is_open()) {
            break;
        }
    }
    refused.extend(asked.iter().filter(|one| one.leave).map(|one| one.server.ip()));
    let answers: Vec<(SocketAddr, Sample)> =
        asked.iter().filter_map(|one| Some((one.server, one.sample?))).collect();
    let samples: Vec<Sample> = answers.iter().map(|(_, sample)| *sample).collect();
    let chosen = discipline::choose(&samples).map_err(|error| error.to_string())?;
    match chosen.and_then(|place| answers.get(place)) {
        Some(answer) => Ok(*answer),
        None => {
            let why: Vec<String> = asked.iter().map(Asked::why).collect();
            Err(format!("no time server answers: {}", why.join(", ")))
        }
    }
}

/// One server in a query.
struct Asked {
    server: SocketAddr,
    cookie: u64,
    /// By our clock, and by one that nobody sets.
    sent: (i128, Instant),
    sample: Option<Sample>,
    leave: bool,
    problem: Option<String>,
}

impl Asked {
    fn new(server: SocketAddr) -> Self {
        let sent = (now_ns(), Instant::now());
        Self { server, cookie: 0, sent, sample: None, leave: false, problem: None }
    }

    fn is_open(&self) -> bool {
        self.sample.is_none() && !self.leave
    }

    fn ask(&mut self, socket: &UdpSocket, v4: bool) {
        let mut cookie = [0; 8];
        if rustix::rand::getrandom(&mut cookie, rustix::rand::GetRandomFlags::empty()).is_err() {
            self.problem = Some("no randomness".to_owned());
            return;
        }
        self.cookie = u64::from_be_bytes(cookie);
        let to = match self.server.ip() {
            IpAddr::V4(ip) if !v4 => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), self.server.port())
            }
            _ => self.server,
        };
        self.sent = (now_ns(), Instant::now());
        self.problem = match socket.send_to(&sntp::request(self.cookie), to) {
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        };
    }

    fn hear(&mut self, bytes: &[u8]) {
        // The time between is taken from the clock that nobody sets meanwhile.
        let spent = i128::try_from(self.sent.1.elapsed().as_nanos()).unwrap_or(i128::MAX);
        let received = self.sent.0.saturating_add(spent);
        match sntp::read(bytes, self.cookie, self.sent.0, received) {
            Ok(Reply::Time(sample)) => self.sample = Some(sample),
            Ok(Reply::Leave) => self.leave = true,
            Ok(Reply::Slower) => self.problem = Some("it wants to be asked less often".to_owned()),
            // Not its words: it may still answer.
            Err(NoReply::Foreign) => {}
            Err(why) => self.problem = Some(why.to_string()),
        }
    }

    fn why(&self) -> String {
        let why = if self.leave { "refuses" } else { self.problem.as_deref().unwrap_or("silent") };
        format!("{} ({why})", self.server.ip())
    }
}

/// Takes answers until all are there or an attempt's time is over.
fn listen(socket: &UdpSocket, asked: &mut [Asked]) -> Result<(), String> {
    let until = Instant::now() + ATTEMPT;
    let mut bytes = [0; LENGTH * 4];
    while asked.iter().any(Asked::is_open) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left)).map_err(|error| format!("UDP socket: {error}"))?;
        let Ok((length, from)) = socket.recv_from(&mut bytes) else { continue };
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        for one in asked.iter_mut().filter(|one| one.server == from && one.is_open()) {
            one.hear(bytes.get(..length).unwrap_or_default());
        }
    }
    Ok(())
}

/// What our clock lacks by the `Date` of an HTTP server (RFC 9110 section 6.6.1), nanoseconds; good to a second.
///
/// # Errors
/// When it does not answer, or without a date.
pub fn ask_web(transport: &Transport, url: &str) -> Result<i128, String> {
    let begun = Instant::now();
    let response = transport.head(url, &[]).map_err(|error| crate::agent::chain(&error))?;
    if begun.elapsed() > WEB_PATIENCE {
        return Err("it took too long to say what time it is".to_owned());
    }
    let date = response.header("date").ok_or("it says no date")?;
    let time = httpdate::parse_http_date(date).map_err(|_| format!("its date is {date:?}"))?;
    let since = time.duration_since(SystemTime::UNIX_EPOCH).map_err(|error| error.to_string())?;
    // The second has begun some time ago: half a one on average.
    let time = i128::from(since.as_secs()) * SECOND + SECOND / 2;
    Ok(time - now_ns())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server on the loopback that answers every request as `answer` says.
    fn server(answer: fn(&[u8]) -> Vec<u8>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("socket");
        let address = socket.local_addr().expect("address");
        std::thread::spawn(move || {
            let mut bytes = [0; 100];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&answer(&bytes[..length]), from).expect("answer");
            }
        });
        address
    }

    fn good(request: &[u8]) -> Vec<u8> {
        let mut reply = vec![0b00_100_100, 1];
        reply.resize(LENGTH, 0);
        reply[24..32].copy_from_slice(&request[40..48]);
        // An hour ahead of this machine.
        let seconds = u32::try_from(now_ns() / SECOND + 2_208_988_800 + 3600).expect("era 0");
        for at in [32, 40] {
            reply[at..at + 4].copy_from_slice(&seconds.to_be_bytes());
        }
        reply[47] = 1;
        reply
    }

    #[test]
    fn a_server_that_answers_is_taken_beside_one_that_lies_about_the_request() {
        let broken = server(|_| good(&[7; 48]));
        let mut refused = Vec::new();
        let right = server(good);
        let (from, sample) = query(&[broken, right], &mut refused).expect("time");
        assert_eq!(from, right);
        assert!((sample.offset_ns - 3600 * SECOND).abs() < 2 * SECOND, "{sample:?}");
        assert!(refused.is_empty());
    }

    #[test]
    fn a_server_that_refuses_is_left_alone_and_named() {
        let deny = server(|request| {
            let mut reply = good(request);
            reply[1] = 0;
            reply[12..16].copy_from_slice(b"DENY");
            reply
        });
        let mut refused = Vec::new();
        let problem = query(&[deny], &mut refused).expect_err("no time");
        assert_eq!(problem, "no time server answers: 127.0.0.1 (refuses)");
        assert_eq!(refused, [deny.ip()]);
    }
}
