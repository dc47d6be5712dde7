//! Several rounds of the same measurement as one.

/// One point of a latency curve over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CurvePoint {
    /// Share of the requests that are at least this fast, 0 to 1.
    pub quantile: f64,
    /// The best round, µs.
    pub low_us: f64,
    /// The median over the rounds, µs.
    pub median_us: f64,
    /// The worst round, µs.
    pub high_us: f64,
}

/// The median; of an even number of values, the mean of the two in the middle. None of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The curve over the rounds, each of which is (quantile, µs), at the quantiles that every round has.
pub fn over_rounds(rounds: &[&[(f64, f64)]]) -> Vec<CurvePoint> {
    let Some(first) = rounds.first() else {
        return Vec::new();
    };
    let at = |round: &[(f64, f64)], quantile: f64| {
        let point = round.iter().find(|p| (p.0 - quantile).abs() < 1e-9);
        point.map(|p| p.1)
    };
    let points = first.iter().filter_map(|(quantile, _)| {
        let values: Option<Vec<f64>> = rounds.iter().map(|r| at(r, *quantile)).collect();
        let values = values?;
        Some(CurvePoint {
            quantile: *quantile,
            low_us: values.iter().copied().fold(f64::INFINITY, f64::min),
            median_us: median(values.iter().copied())?,
            high_us: values.iter().copied().fold(0.0, f64::max),
        })
    });
    points.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_an_outlier_does_not_move_it() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([1000.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([1.0, 2.0, 3.0, 1000.0]), Some(2.5));
    }

    #[test]
    fn a_curve_keeps_only_the_quantiles_of_every_round() {
        let points = over_rounds(&[
            &[(0.5, 1.0), (0.75, 4.0)],
            &[(0.5, 3.0), (0.75, 5.0), (0.875, 9.0)],
        ]);
        assert_eq!(points.len(), 2);
        assert_eq!(
            (points[0].low_us, points[0].median_us, points[0].high_us),
            (1.0, 2.0, 3.0)
        );
        assert_eq!(over_rounds(&[]), []);
    }
}
