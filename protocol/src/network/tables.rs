//! The part of TOML 1.0 that the network's file is written in: tables in arrays (`[[name]]`), bare keys, strings on one
//! line, whole numbers, true and false, arrays of strings over one or more lines, comments. Whatever is read here means
//! the same to every reader of TOML; what is not read here is said with its line. The agent has no other use for TOML,
//! and a full reader is ten times as large.

/// Longest file that is read, in bytes.
pub(super) const MAX_FILE: usize = 64 * 1024;
/// Most problems that are said of one file.
const MAX_PROBLEMS: usize = 20;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Number(u64),
    Flag(bool),
    List(Vec<String>),
}

/// A key with its value and the line on which it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) line: usize,
    pub(super) key: String,
    pub(super) value: Value,
}

/// `[[name]]` and what follows; the first has no name and holds what stands before all others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Table {
    pub(super) line: usize,
    pub(super) name: String,
    pub(super) entries: Vec<Entry>,
}

/// Reads a file; what is wrong is left out and noted.
pub(super) fn parse(text: &str, problems: &mut Vec<String>) -> Vec<Table> {
    let mut tables = vec![Table::default()];
    if text.len() > MAX_FILE {
        problems.push(format!("longer than {MAX_FILE} bytes"));
        return tables;
    }
    let mut lines = text.lines().zip(1..);
    while let Some((text, line)) = lines.next() {
        let mut joined = text.to_owned();
        // An array may go on; its lines are joined until it ends or cannot be read anyway.
        while let Err(Trouble::Unfinished) = statement(&joined) {
            let Some((more, _)) = lines.next() else { break };
            joined.push('\n');
            joined.push_str(more);
        }
        let trouble = match statement(&joined) {
            Ok(None) => continue,
            Ok(Some(Statement::Table(name))) => {
                tables.push(Table { line, name, entries: Vec::new() });
                continue;
            }
            Ok(Some(Statement::Entry(key, value))) => {
                let Some(table) = tables.last_mut() else { continue };
                if table.entries.iter().all(|entry| entry.key != key) {
                    table.entries.push(Entry { line, key, value });
                    continue;
                }
                format!("`{key}` stands here twice")
            }
            Err(Trouble::Unfinished) => "this array does not end".to_owned(),
            Err(Trouble::Said(what)) => what.to_owned(),
        };
        if problems.len() < MAX_PROBLEMS {
            problems.push(format!("line {line}: {trouble}"));
        }
    }
    tables
}

enum Statement {
    Table(String),
    Entry(String, Value),
}

enum Trouble {
    /// More lines are needed.
    Unfinished,
    Said(&'static str),
}

fn statement(text: &str) -> Result<Option<Statement>, Trouble> {
    let text = text.trim_start_matches([' ', '\t']);
    if text.is_empty() || text.starts_with('#') {
        return end(text).map(|()| None);
    }
    if let Some(rest) = text.strip_prefix("[[") {
        let (name, rest) = bare(rest.trim_start_matches([' ', '\t']))?;
        let rest = rest.trim_start_matches([' ', '\t']).strip_prefix("]]");
        end(rest.ok_or(Trouble::Said("expected `]]`"))?)?;
        return Ok(Some(Statement::Table(name)));
    }
    if text.starts_with('[') {
        return Err(Trouble::Said("expected [[interface]], [[vlan]] or [[bond]]"));
    }
    let (key, rest) = bare(text)?;
    let rest = rest.trim_start_matches([' ', '\t']).strip_prefix('=');
    let rest = rest.ok_or(Trouble::Said("expected `key = value`"))?;
    let (value, rest) = value(rest.trim_start_matches([' ', '\t']))?;
    end(rest)?;
    Ok(Some(Statement::Entry(key, value)))
}

/// Nothing but a comment, in which TOML has no control characters.
fn end(text: &str) -> Result<(), Trouble> {
    let text = text.trim_start_matches([' ', '\t']);
    match text.is_empty() || (text.starts_with('#') && !text.contains(is_control)) {
        true => Ok(()),
        false => Err(Trouble::Said("this is followed by something that is no comment")),
    }
}

fn is_control(c: char) -> bool {
    c != '\t' && c.is_ascii_control()
}

/// A key of letters, digits, `-` and `_`.
fn bare(text: &str) -> Result<(String, &str), Trouble> {
    let is_key = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let len = text.find(|c| !is_key(c)).unwrap_or(text.len());
    match text.split_at_checked(len) {
        Some((key, rest)) if len > 0 => Ok((key.to_owned(), rest)),
        _ => Err(Trouble::Said("expected a key of letters, digits, - and _")),
    }
}

fn value(text: &str) -> Result<(Value, &str), Trouble> {
    if let Some(rest) = text.strip_prefix('[') {
        return list(rest);
    }
    if text.starts_with(['"', '\'']) {
        return string(text).map(|(text, rest)| (Value::Text(text), rest));
    }
    let len = text.find([' ', '\t', '#']).unwrap_or(text.len());
    let (word, rest) = text.split_at_checked(len).unwrap_or((text, ""));
    let is_number = word == "0" || !word.starts_with('0');
    let value = match word {
        "true" => Value::Flag(true),
        "false" => Value::Flag(false),
        _ if is_number && !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()) => {
            let number =
                word.parse::<u32>().map_err(|_| Trouble::Said("this number is too large"))?;
            Value::Number(number.into())
        }
        _ => {
            let what = "expected \"text\", a number, true, false or [\"text\", ...]";
            return Err(Trouble::Said(what));
        }
    };
    Ok((value, rest))
}

fn string(text: &str) -> Result<(String, &str), Trouble> {
    const OPEN: Trouble = Trouble::Said("this text does not end on its line");
    if text.starts_with("\"\"\"") || text.starts_with("'''") {
        return Err(Trouble::Said("texts of several lines are not read here"));
    }
    let mut chars = text.char_indices();
    let quote = chars.next().map(|(_, quote)| quote).filter(|quote| ['"', '\''].contains(quote));
    let quote = quote.ok_or(Trouble::Said("expected a text in quotes"))?;
    let mut found = String::new();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => return Ok((found, text.get(at + 1..).unwrap_or_default())),
            '\\' if quote == '"' => match chars.next() {
                Some((_, c @ ('"' | '\\'))) => found.push(c),
                _ => return Err(Trouble::Said("only \\\" and \\\\ are read after a backslash")),
            },
            _ if is_control(c) => return Err(OPEN),
            _ => found.push(c),
        }
    }
    Err(OPEN)
}

/// What follows `[`.
fn list(mut text: &str) -> Result<(Value, &str), Trouble> {
    let mut found = Vec::new();
    loop {
        text = blank(text)?;
        if let Some(rest) = text.strip_prefix(']') {
            return Ok((Value::List(found), rest));
        }
        let (item, rest) = string(text)?;
        found.push(item);
        text = blank(rest)?;
        match text.strip_prefix(',') {
            Some(rest) => text = rest,
            None if text.starts_with(']') => {}
            None => return Err(Trouble::Said("expected `,` or `]`")),
        }
    }
}

/// Over spaces, ends of lines and comments; there must be something then.
fn blank(mut text: &str) -> Result<&str, Trouble> {
    loop {
        text = text.trim_start_matches([' ', '\t', '\n']);
        match text.strip_prefix('#') {
            Some(comment) => {
                let (comment, rest) = comment.split_once('\n').ok_or(Trouble::Unfinished)?;
                end(&format!("#{comment}"))?;
                text = rest;
            }
            None if text.is_empty() => return Err(Trouble::Unfinished),
            None => return Ok(text),
        }
    }
}
