//! Numbers in rows: order statistics, and columns that stand straight.

/// Sorted numbers.
#[derive(Clone, Debug)]
pub(crate) struct Numbers(Vec<f64>);

impl Numbers {
    /// Sorts them.
    pub(crate) fn new(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        Self(numbers)
    }

    /// The smallest number that `percent` of 100 do not exceed (nearest rank); NaN when there is none.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    /// Half are below, half above.
    pub(crate) fn median(&self) -> f64 {
        match self.0.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => self.0[count / 2],
            count => f64::midpoint(self.0[count / 2 - 1], self.0[count / 2]),
        }
    }

    /// The smallest.
    pub(crate) fn min(&self) -> f64 {
        self.percentile(0)
    }

    /// The greatest.
    pub(crate) fn max(&self) -> f64 {
        self.percentile(100)
    }

    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// `min / median / max`, each as `show` writes it.
    pub(crate) fn spread(&self, show: impl Fn(f64) -> String) -> String {
        format!("{} / {} / {}", show(self.min()), show(self.median()), show(self.max()))
    }
}

/// About four digits that matter.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".to_owned(),
        100.0.. => thousands(value),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Whole, with `,` between thousands.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Rows below a header; the first column to the left, the others to the right.
pub(crate) fn render<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let header = header.map(str::to_owned);
    let all = || std::iter::once(&header).chain(rows);
    let widths: [usize; N] =
        std::array::from_fn(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in all() {
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let gap = width - cell.chars().count() + if column == 0 { 0 } else { 2 };
            let gap = " ".repeat(gap);
            text.push_str(&if column == 0 { format!("{cell}{gap}") } else { format!("{gap}{cell}") });
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// For quotients; exact up to 2^53.
pub(crate) fn to_f64(number: u64) -> f64 {
    number as f64
}
