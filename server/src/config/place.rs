//! Where in a TOML text something stands: for errors that name line and key. A reader of lines, not of TOML: it is
//! only asked about texts in which the parser has found a place.

/// Line, and key or section, at a byte offset: `, line 3, key server.url`.
pub(super) fn at(text: &str, offset: usize) -> String {
    let mut section = "";
    let mut start = 0;
    let mut open = None;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = start + line.len();
        let quoted = open.is_some();
        open = still_open(line, open);
        let header = header(line).filter(|_| !quoted);
        let key = |line| key(line).filter(|_| !quoted);
        section = header.unwrap_or(section);
        if offset < end || end == text.len() {
            let line_number = index + 1;
            return match (header, key(line)) {
                (None, Some(key)) if section.is_empty() => {
                    format!(", line {line_number}, key {key}")
                }
                (None, Some(key)) => format!(", line {line_number}, key {section}.{key}"),
                _ if section.is_empty() => format!(", line {line_number}"),
                _ => format!(", line {line_number}, section [{section}]"),
            };
        }
        start = end;
    }
    String::new()
}

/// The line, from 1, of a key in the nth section of that name; of the section's header when the key is not there.
pub(super) fn line_of(text: &str, section: &str, nth: usize, wanted: &str) -> Option<usize> {
    let mut seen = 0;
    let mut inside = None;
    let mut open = None;
    for (index, line) in text.lines().enumerate() {
        let quoted = open.is_some();
        open = still_open(line, open);
        match header(line) {
            _ if quoted => {}
            Some(name) => {
                if inside.is_some() {
                    return inside;
                }
                if name == section {
                    if seen == nth {
                        inside = Some(index + 1);
                    }
                    seen += 1;
                }
            }
            None if inside.is_some() && key(line) == Some(wanted) => return Some(index + 1),
            None => {}
        }
    }
    inside
}

/// The quotes of the multi-line string that a line leaves open, after those that it began in.
fn still_open(line: &str, open: Option<&'static str>) -> Option<&'static str> {
    if open.is_none() && line.trim_start().starts_with('#') {
        return None;
    }
    let (mut open, mut rest) = (open, line);
    loop {
        let found = match open {
            Some(quotes) => rest.find(quotes).map(|at| (at, None)),
            None => {
                let kinds = ["\"\"\"", "'''"].into_iter();
                kinds.filter_map(|it| Some((rest.find(it)?, Some(it)))).min_by_key(|it| it.0)
            }
        };
        let Some((at, next)) = found else { return open };
        open = next;
        rest = rest.get(at + 3..).unwrap_or_default();
    }
}

fn header(line: &str) -> Option<&str> {
    let line = line.trim();
    let name = line.strip_prefix('[')?.trim_start_matches('[').split(']').next()?.trim();
    (!line.contains('=') && !name.starts_with('"')).then_some(name)
}

fn key(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    (!key.is_empty() && key.chars().all(good)).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "top = 1\n[a]\nx = 1\n[[b]]\nx = 2\n[[b]]\ny = [\n  \"p\",\n]\n";

    #[test]
    fn an_offset_becomes_line_and_key() {
        for (needle, expected) in [
            ("1", ", line 1, key top"),
            ("[a]", ", line 2, section [a]"),
            ("2", ", line 5, key b.x"),
            ("\"p\"", ", line 8, section [b]"),
        ] {
            assert_eq!(at(TEXT, TEXT.find(needle).expect(needle)), expected);
        }
        assert_eq!(at("", 0), "");
        assert_eq!(at(TEXT, usize::MAX), ", line 9, section [b]");
    }

    #[test]
    fn lines_of_a_text_over_several_lines_are_neither_headers_nor_keys() {
        let text = "[[f]]\nc = \"\"\"\n[[f]]\nn = 1\n\"\"\"\n[[f]]\nd = '''x'''\nn = 2\n";
        assert_eq!(line_of(text, "f", 0, "n"), Some(1));
        assert_eq!(line_of(text, "f", 1, "n"), Some(8));
        let place = |needle| at(text, text.find(needle).expect(needle));
        assert_eq!(place("n = 1"), ", line 4, section [f]");
        assert_eq!(place("n = 2"), ", line 8, key f.n");
    }

    #[test]
    fn a_key_is_found_in_the_section_it_belongs_to() {
        assert_eq!(line_of(TEXT, "a", 0, "x"), Some(3));
        assert_eq!(line_of(TEXT, "b", 0, "x"), Some(5));
        assert_eq!(line_of(TEXT, "b", 1, "y"), Some(7));
        assert_eq!(line_of(TEXT, "b", 1, "x"), Some(6));
        assert_eq!(line_of(TEXT, "c", 0, "x"), None);
    }
}
