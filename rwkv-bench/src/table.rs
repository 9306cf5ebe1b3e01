//! Tables, for a terminal and for a document.

/// What is longer is no number.
const SENTENCE: usize = 32;

/// Texts in columns; the first is a name.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&text| text.to_owned()).collect()] }
    }

    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// All rows, the head first.
    pub(crate) fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// Aligned, or as markdown.
    pub(crate) fn text(&self, markdown: bool) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|text| text.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // Names and sentences begin alike, numbers end alike.
        let left = |column: usize| column == 0 || widths[column] > SENTENCE;
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            if markdown {
                text += &format!("| {} |\n", row.join(" | "));
                if index == 0 {
                    text += &format!("|---|{}\n", "---:|".repeat(columns.saturating_sub(1)));
                }
                continue;
            }
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if left(column) { format!("  {cell:<width$}") } else { format!("  {cell:>width$}") }
            });
            text += cells.collect::<String>().trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn both_ways() {
        let mut table = Table::new(&["row", "bits"]);
        table.push(vec!["f16-c16".to_owned(), "1.5".to_owned()]);
        assert_eq!(table.text(false), "  row      bits\n  f16-c16   1.5\n", "aligned");
        assert_eq!(table.text(true), "| row | bits |\n|---|---:|\n| f16-c16 | 1.5 |\n", "markdown");
    }
}
