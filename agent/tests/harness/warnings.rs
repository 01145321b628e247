//! What an agent under test says of trouble, most of which a test made on purpose: kept, and shown with a test that fails.

use std::fs::{self, File};
use std::path::Path;

const FILE: &str = "warnings";

/// Where an agent of a test with this directory says it.
pub(crate) fn warnings(dir: &Path) -> File {
    let options = File::options().create(true).append(true).open(dir.join(FILE));
    options.expect("a file for warnings")
}

/// Shows it if the test has failed.
#[expect(
    clippy::print_stderr,
    reason = "the harness captures what is printed so, and nothing else"
)]
pub(crate) fn show_warnings(dir: &Path) {
    if std::thread::panicking() {
        eprint!("{}", fs::read_to_string(dir.join(FILE)).unwrap_or_default());
    }
}
