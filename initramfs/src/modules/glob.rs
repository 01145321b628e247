//! Path patterns: `*` for any run of characters within one component, `**` for any number of components. Pure.

/// Whether the path matches the pattern, both split at `/`.
#[must_use]
pub fn matches(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<_>, Vec<_>) =
        (pattern.split('/').collect(), path.split('/').collect());
    run(&pattern, &path, |part| *part == "**", |part, name| component(part, name))
}

fn component(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<_>, Vec<_>) = (pattern.chars().collect(), name.chars().collect());
    run(&pattern, &name, |c| *c == '*', |a, b| a == b)
}

/// Wildcard matching that goes back to the last wildcard only: the product of both lengths at worst.
fn run<T>(
    pattern: &[T],
    text: &[T],
    is_any: impl Fn(&T) -> bool,
    same: impl Fn(&T, &T) -> bool,
) -> bool {
    let (mut p, mut t, mut retry) = (0, 0, None);
    loop {
        match (pattern.get(p), text.get(t)) {
            (Some(any), _) if is_any(any) => {
                retry = Some((p + 1, t));
                p += 1;
            }
            (Some(a), Some(b)) if same(a, b) => (p, t) = (p + 1, t + 1),
            (None, None) => return true,
            (_, _) => match retry {
                Some((after, from)) if from < text.len() => {
                    retry = Some((after, from + 1));
                    (p, t) = (after, from + 1);
                }
                _ => return false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, path: &str, expect: bool) {
        assert_eq!(matches(pattern, path), expect, "{pattern} on {path}");
    }

    #[test]
    fn stars_stay_in_their_component_and_double_stars_do_not() {
        check("a/b.ko", "a/b.ko", true);
        check("a/*.ko", "a/b.ko", true);
        check("a/*.ko", "a/b/c.ko", false);
        check("a/**", "a/b/c.ko", true);
        check("a/**/c.ko", "a/c.ko", true);
        check("a/**/c.ko", "a/b/d/c.ko", true);
        check("a/**/c*.ko", "a/b/d/c_x.ko", true);
        check("a/**", "b/a/c", false);
        check("**/x*y*z", "q/xaaybbz", true);
        check("**/x*y*z", "q/xaaybb", false);
        check("", "a", false);
    }
}
