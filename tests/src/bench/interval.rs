//! A median with the interval that contains the true one, from order statistics: nothing is assumed of how the figures scatter.

use serde::Serialize;

/// How surely the interval is to contain the median.
const SURE: f64 = 0.95;

/// The median of figures that were taken independently, and between which of them the true median is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// The median.
    pub median: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// How probably the true median is between them; below 0.95 for fewer than six figures, where they are the least and the greatest.
    pub sure: f64,
    /// How many figures there are.
    pub count: usize,
}

impl Interval {
    /// Of these figures; None where there are none, or one is no number.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        if sorted.is_empty() || sorted.iter().any(|f| f.is_nan()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let (cut, sure) = outside(count);
        Some(Self {
            median: f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]),
            low: sorted[cut],
            high: sorted[count - 1 - cut],
            sure,
            count,
        })
    }

    /// Whether the interval contains it.
    pub fn contains(&self, figure: f64) -> bool {
        self.low <= figure && figure <= self.high
    }
}

impl std::fmt::Display for Interval {
    /// `0.98 (0.95 to 1.01)`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.2} ({:.2} to {:.2})",
            self.median, self.low, self.high
        )
    }
}

/// How many of `count` sorted figures may be left out at each end, and how probably the median is between those that remain.
///
/// Each figure is below the true median with probability one half, so the number that are is binomial: the median is outside when it is
/// at most `cut`, or at least `count - cut`.
fn outside(count: usize) -> (usize, f64) {
    let mut probability = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut below = probability;
    let mut best = (0, 1.0 - 2.0 * below);
    for cut in 1..count / 2 {
        probability *= (count + 1 - cut) as f64 / cut as f64;
        below += probability;
        if 1.0 - 2.0 * below < SURE {
            break;
        }
        best = (cut, 1.0 - 2.0 * below);
    }
    (best.0, best.1.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From tables of the sign test: ranks and coverage.
    #[test]
    fn the_ranks_are_those_of_the_sign_test() {
        for (count, cut, sure) in [
            (1, 0, 0.0),
            (5, 0, 0.9375),
            (6, 0, 0.96875),
            (8, 0, 0.9922),
            (9, 1, 0.9609),
            (10, 1, 0.9785),
            (12, 2, 0.9614),
            (20, 5, 0.9586),
        ] {
            let found = outside(count);
            assert_eq!(found.0, cut, "{count}");
            assert!((found.1 - sure).abs() < 1e-4, "{count}: {}", found.1);
        }
    }

    #[test]
    fn the_ends_are_figures_and_outliers_do_not_move_them() {
        let figures = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0, 1000.0];
        let interval = Interval::of(figures).expect("figures");
        assert_eq!(
            (interval.median, interval.low, interval.high),
            (5.5, 2.0, 9.0)
        );
        assert!(interval.contains(9.0) && !interval.contains(1.9));
        assert_eq!(interval.to_string(), "5.50 (2.00 to 9.00)");
        assert_eq!(Interval::of([]), None);
        assert_eq!(Interval::of([1.0, f64::NAN]), None);
    }

    /// Nineteen of twenty such intervals contain the true median, whatever the distribution.
    #[test]
    fn as_many_contain_the_median_as_they_say() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        // Skewed: the median of an exponential distribution is ln 2.
        let mut exponential = || -(1.0 - uniform()).ln();
        let trials = 4000;
        let hits = (0..trials)
            .filter(|_| {
                let figures: Vec<f64> = (0..12).map(|_| exponential()).collect();
                Interval::of(figures).is_some_and(|i| i.contains(std::f64::consts::LN_2))
            })
            .count();
        let share = hits as f64 / f64::from(trials);
        assert!((0.95..0.975).contains(&share), "{share}");
    }
}
