//! Rules for one source file. Pure: a path and a text in, problems out.

/// Most lines of a file before its inline tests.
const MAX_LINES: usize = 500;

/// The part of PID 1 that stays, and most lines of code that it may have: neither blank nor comment, before the tests.
const RESIDENT: [&str; 3] =
    ["agent/src/init/resident.rs", "agent/src/init/resident/", "agent/src/init/rescue.rs"];
const MAX_RESIDENT: usize = 499;

/// Unsafe code. Split, as below.
const UNSAFE: [&str; 3] =
    [concat!("uns", "afe {"), concat!("uns", "afe fn"), concat!("uns", "afe impl")];

/// Where it may stand.
const UNSAFE_ROOMS: [&str; 2] = ["agent/src/sys.rs", "agent/src/sys/"];

/// Words that must not stay in the code. Split so that this file does not break its own rule.
const UNFINISHED: [&str; 7] = [
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("dbg", "!("),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("#[ig", "nore"),
    concat!("#[should_", "panic"),
];

/// What the pure crate must not name.
const IMPURE: [&str; 6] =
    ["std::fs", "std::process", "std::thread", "SystemTime", "Instant::now", "tokio"];

/// Lines before the inline tests: all where there are none, for what is declared here and stands in a file of its own is no reason.
fn before_tests(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let inline = |pair: &[&str]| matches!(pair, [first, second] if first.starts_with("#[cfg(test)]") && second.contains('{'));
    lines.windows(2).position(inline).unwrap_or(lines.len())
}

/// Everything wrong with this file, each as `PATH:LINE: RULE`.
pub(crate) fn problems(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if !text.starts_with("//!") {
        problems.push(format!(
            "{path}:1: does not open with `//!`: say what it is, and what it is not"
        ));
    }
    let is_test_file =
        path.contains("/tests/") || path.ends_with("_tests.rs") || path.ends_with("/tests.rs");
    let code_lines = before_tests(text);
    if code_lines > MAX_LINES {
        problems.push(format!(
            "{path}: {code_lines} lines before its tests, more than {MAX_LINES}: find the wall"
        ));
    }
    for (index, line) in text.lines().enumerate() {
        let place = format!("{path}:{}", index + 1);
        let code = line.split("//").next().unwrap_or_default();
        let in_code = index < code_lines && !is_test_file;
        if line.ends_with([' ', '\t']) {
            problems.push(format!("{place}: trailing white space"));
        }
        for word in UNFINISHED.iter().filter(|word| line.contains(**word)) {
            problems.push(format!("{place}: `{word}` is left in the code"));
        }
        let unsafe_code = UNSAFE.iter().any(|word| code.contains(word));
        if unsafe_code && !UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
            problems.push(format!("{place}: unsafe code stands only in agent/src/sys"));
        }
        if path.starts_with("protocol/src/") && in_code {
            for word in IMPURE.iter().filter(|word| code.contains(**word)) {
                problems.push(format!(
                    "{place}: `{word}`: protocol is pure, no I/O, no async, no clock"
                ));
            }
        }
    }
    problems
}

/// PID 1's resident part, if it has grown too large. `files` are all of the workspace's, as path and text.
pub(crate) fn resident<'a>(files: impl Iterator<Item = (&'a str, &'a str)>) -> Option<String> {
    let code = |text: &str| {
        let lines = text.lines().take(before_tests(text));
        lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
    };
    let of_it = files.filter(|(path, _)| RESIDENT.iter().any(|room| path.starts_with(room)));
    let lines: usize = of_it.map(|(_, text)| code(text)).sum();
    (lines > MAX_RESIDENT).then(|| {
        format!(
            "agent/src/init/resident: {lines} lines of code, more than {MAX_RESIDENT}: what needs not stay \
             with PID 1 belongs to a stage of its own"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, text: &str, expected: &str) {
        let found = problems(path, text).join("\n");
        assert!(found.contains(expected), "{found}");
    }

    #[test]
    fn each_rule_is_noticed_when_broken() {
        check("a.rs", "fn a() {}\n", "does not open with");
        check("a.rs", &format!("//! A.\n{}", "\n".repeat(600)), "lines before its tests");
        let declared = format!("//! A.\n#[cfg(test)]\nmod tests;\n{}", "\n".repeat(600));
        check("a.rs", &declared, "lines before its tests");
        check("a/tests/a.rs", &declared, "lines before its tests");
        check("a.rs", "//! A. \n", "trailing white space");
        check("a.rs", &format!("//! A.\n{}\n", UNFINISHED[0]), "left in the code");
        check("server/src/a.rs", concat!("//! A.\nuns", "afe { x }\n"), "agent/src/sys");
        check("protocol/src/a.rs", "//! A.\nuse std::fs;\n", "protocol is pure");
    }

    #[test]
    fn pid_1_is_counted_without_comments_and_tests() {
        let code = "x();\n".repeat(MAX_RESIDENT - 1);
        let text = format!("//! A.\n\n    /// B\n{code}#[cfg(test)]\nmod tests {{ a(); }}\n");
        let other = ("agent/src/init.rs", text.as_str());
        let count = |extra| {
            let files = [
                other,
                ("agent/src/init/resident.rs", &text),
                ("agent/src/init/resident/a.rs", extra),
            ];
            resident(files.into_iter())
        };
        assert_eq!(count("a();\n"), None);
        assert!(count("a();\nb();\n").is_some_and(|problem| problem.contains("500 lines")));
    }

    #[test]
    fn a_good_file_has_no_problems() {
        let text = "//! A.\nfn a() {}\n#[cfg(test)]\nmod tests { fn b() { x.unwrap(); } }\n";
        assert_eq!(problems("agent/src/a.rs", text), Vec::<String>::new());
        let text = concat!("//! A.\nuns", "afe { x }\n");
        assert_eq!(problems("agent/src/sys/a.rs", text), Vec::<String>::new());
    }
}
