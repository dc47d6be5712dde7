//! Text for terminals: aligned columns, folded paragraphs. No colours: the output is read by scripts as well.

/// Columns, each as wide as its widest cell; two blanks between them, none at the end of a line.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// `text` folded at blanks to lines of at most `width` characters, the second and later ones indented. Words longer
/// than that stay whole: they are paths and commands.
pub(crate) fn fold(text: &str, indent: usize, width: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last().map_or("", String::as_str);
        let used = line.chars().count();
        if used > 0 && indent + used + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else if let Some(line) = lines.last_mut() {
            if used > 0 {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join(&format!("\n{}", " ".repeat(indent)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect();
        let text = table(&[
            row(&["POD", "WINDOW"]),
            row(&["default/a", "20 µs"]),
            row(&["b"]),
        ]);
        assert_eq!(text, "POD        WINDOW\ndefault/a  20 µs\nb\n");
    }

    #[test]
    fn long_text_is_folded_at_blanks_only() {
        assert_eq!(fold("one two three", 4, 12), "one two\n    three");
        assert_eq!(fold("/a/very/long/path x", 2, 8), "/a/very/long/path\n  x");
        assert_eq!(fold("", 2, 8), "");
    }
}
