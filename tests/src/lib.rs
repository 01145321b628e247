//! The lab: a private cluster in a network namespace, for the whole-system cases, the demo and the benches.
//!
//! It holds the machinery only. What Layercake must do stands in the cases under `tests/tests/`, which read like
//! prose; nothing in here decides whether Layercake is right.
//!
//! | module | what it holds |
//! |---|---|
//! | [`prerequisites`] | what the lab needs on this machine, and how it is installed |
//! | [`artifacts`] | where the things under test were built to |
//! | [`wait`] | bounded waits, all of which Ctrl-C ends |
//! | [`namespace`] | the private network namespace and the thread that lives in it |
//! | [`process`] | children that die with the lab, whatever happens to it |
//! | [`lab`] | bridge, cables and everything on them; the frame of a case |
//! | [`cable`] | what connects a machine to the bridge: a tap, or a relay where there can be none |
//! | [`router`] | router advertisements, so that iPXE does not wait for them |
//! | [`capture`] | everything that passed the bridge, as a pcap file |
//! | [`qemu`] | machines |
//! | [`console`] | reading a serial console, and typing at it |
//! | [`evidence`] | what is kept when a case fails |
//! | [`overlay`] | a Layer0 with a rescue shell in it |
//! | [`server_peer`] | `layercake serve` in the lab |
//! | [`registry_peer`] | Debian's docker-registry in the lab |
//! | [`time_peer`] | chronyd in the lab |
//! | [`ssh`] | a machine's ssh, with a key |
//! | [`client`] | a typed client for `/v1`, speaking from inside the lab |
//! | [`examples`] | example ImageSets that take long to make, made once |
//! | [`story`] | the words in which the cases are told |
//! | [`probe`] | how long a service was away, as its client sees it |

pub mod wait;

pub mod artifacts;
pub mod prerequisites;

pub mod namespace;
pub mod process;

pub mod cable;
pub mod capture;
mod packet;
pub mod router;

pub mod console;
pub mod qemu;

pub mod client;
pub mod overlay;
pub mod probe;
pub mod registry_peer;
pub mod server_peer;
pub mod ssh;
pub mod time_peer;

pub mod evidence;
pub mod lab;

pub mod examples;
pub mod story;
