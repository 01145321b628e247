//! The allocator that debug builds of PID 1 run with, proven to bite: this program has it, too, and calls itself.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use agent::sys::allocator::{Sealed, seal, unseal};

#[global_allocator]
static ALLOCATOR: Sealed = Sealed;

const CHILD: &str = "LAYERCAKE_SEAL_TEST";

#[test]
fn a_sealed_process_that_allocates_aborts() {
    match std::env::var(CHILD).as_deref() {
        Ok(what) => {
            seal();
            if what == "allocates" {
                drop(std::hint::black_box(vec![1_u8]));
            }
            unseal();
        }
        Err(_) => {
            for (what, signal) in [("allocates", Some(6)), ("does not", None)] {
                // Others of the harness's threads would allocate, too.
                let output = Command::new(std::env::current_exe().unwrap())
                    .arg("--test-threads=1")
                    .env(CHILD, what)
                    .output()
                    .unwrap();
                assert_eq!(output.status.signal(), signal, "{what}: {output:?}");
            }
        }
    }
}
