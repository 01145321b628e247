//! A channel for a log: sends what a [`Source`] has, as fast as the operator takes it.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use protocol::channel::frame::{Exit, Frame, MAX_DATA};
use rustix::event::{PollFd, PollFlags};

use super::link::{Link, LinkError, TICK, wait};

/// How often a log that cannot be watched is looked at.
const BLIND: Duration = Duration::from_millis(500);

/// Where a log comes from.
pub(super) trait Source {
    /// What comes next; 0 when there is no more now.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Readable when there may be more; none when nothing can tell.
    fn news(&self) -> Option<BorrowedFd<'_>>;
    /// Empties [`Self::news`].
    fn take_news(&mut self);
    /// Lets go of what must not be held while nobody reads.
    fn tidy(&mut self);
}

/// Serves it to its end, or until the operator leaves.
pub(super) fn serve(
    link: &mut Link,
    source: &mut dyn Source,
    follow: bool,
) -> Result<(), LinkError> {
    link.send(&Frame::Started)?;
    let mut buffer = vec![0; MAX_DATA];
    loop {
        while let Some(received) = link.receive()? {
            log::debug!("a channel for a log got {received:?}");
        }
        let mut idle = false;
        while let Some(room) = buffer.get_mut(..link.room()).filter(|room| !room.is_empty()) {
            match source.read(room) {
                Ok(0) if follow => {
                    idle = true;
                    break;
                }
                Ok(0) => return link.finish(&Frame::Exit(Exit::Code(0))),
                Ok(count) => {
                    link.send(&Frame::Output(buffer.get(..count).unwrap_or_default()))?;
                }
                Err(error) => {
                    return link
                        .finish(&Frame::Failure(format!("reading the log: {error}").into()));
                }
            }
        }
        let (socket, flags) = link.interest();
        let mut fds = vec![PollFd::from_borrowed_fd(socket, flags)];
        let news = source.news().filter(|_| idle);
        fds.extend(news.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let blind = idle && news.is_none();
        wait(&mut fds, if blind { BLIND } else { TICK })?;
        if idle {
            source.take_news();
        } else {
            source.tidy();
        }
    }
}
