//! Charts: inline SVG for the report, coloured by its style sheet so that they follow the reader's light or dark mode; and the curves
//! that `kbp-plot` draws to files.

use std::fmt::Write;

use kbp_plot::{Curve, Panel, RGBColor, nines, over_rounds};

use super::result::{ArmResult, Bench};

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 58.0;
/// Half of the last label, `99.999 %`, stands there.
const RIGHT: f64 = 28.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 50.0;

/// Number of colours of the style sheet.
pub(crate) const COLOURS: usize = 8;

/// Those of the files, which have no style sheet.
const FILE_COLOURS: [RGBColor; COLOURS] = [
    RGBColor(200, 86, 52),
    RGBColor(38, 96, 164),
    RGBColor(120, 120, 120),
    RGBColor(30, 140, 90),
    RGBColor(150, 80, 160),
    RGBColor(190, 140, 20),
    RGBColor(20, 140, 160),
    RGBColor(170, 50, 90),
];

/// The curves of every arm with latencies, medians over the rounds, bands from the best to the worst round.
pub(crate) fn panels(bench: &Bench) -> Vec<Panel> {
    let curves: Vec<Curve> = bench
        .arms
        .iter()
        .enumerate()
        .filter(|(_, arm)| !arm.histogram.is_empty())
        .map(|(n, arm)| {
            let rounds: Vec<_> = arm.rounds.iter().map(|r| &r.curve[..]).collect();
            Curve {
                label: arm.name.clone(),
                colour: FILE_COLOURS[n % COLOURS],
                points: over_rounds(&rounds),
            }
        })
        .collect();
    if curves.is_empty() {
        return Vec::new();
    }
    vec![Panel {
        title: format!("{}: {} rounds", bench.workload, bench.asked.rounds),
        curves,
    }]
}

/// An axis: a range and its ticks.
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
    label: &'static str,
}

impl Axis {
    /// Logarithmic, from 1, 2, 5 of a decade to another; positions are logarithms.
    fn log(values: impl Iterator<Item = f64> + Clone, label: &'static str) -> Self {
        let low = values
            .clone()
            .filter(|v| *v > 0.0)
            .fold(f64::INFINITY, f64::min);
        let high = values.fold(0.0, f64::max);
        let (low, high) = match low.is_finite() && high > 0.0 {
            true => (low * 0.8, (high * 1.3).max(low * 2.0)),
            false => (1.0, 1000.0),
        };
        let ticks: Vec<f64> = (-2..8)
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)))
            .filter(|t| (low..=high).contains(t))
            .collect();
        // Whole decades only where there are too many.
        let many = ticks.len() > 10;
        let ticks = ticks
            .into_iter()
            .filter(|t| !many || (t.log10() - t.log10().round()).abs() < 1e-9)
            .map(|t| (t.log10(), short(t)))
            .collect();
        Self {
            low: low.log10(),
            high: high.log10(),
            ticks,
            label,
        }
    }

    /// Where a value is, 0 to 1.
    fn at(&self, position: f64) -> f64 {
        ((position - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// A number as a tick has it.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}

/// One line of a chart: its colour's number and its points on the axes.
type Line = (usize, Vec<(f64, f64)>);

fn chart(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let px = |p: f64| LEFT + x.at(p) * (WIDTH - LEFT - RIGHT);
    let py = |p: f64| HEIGHT - BOTTOM - y.at(p) * (HEIGHT - TOP - BOTTOM);
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    );
    for (position, label) in &x.ticks {
        let at = px(*position);
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/><text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 17.0
        );
    }
    for (position, label) in &y.ticks {
        let at = py(*position);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
    }
    let _ = writeln!(
        out,
        "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text class=\"axis\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0,
        x.label,
        (TOP + HEIGHT - BOTTOM) / 2.0,
        y.label
    );
    for (colour, points) in lines {
        let points: Vec<String> = points
            .iter()
            .map(|(a, b)| format!("{:.1},{:.1}", px(*a), py(*b)))
            .collect();
        let _ = writeln!(
            out,
            "<polyline class=\"curve c{}\" points=\"{}\"/>",
            colour % COLOURS,
            points.join(" ")
        );
    }
    out + "</svg>\n"
}

/// Percentile curves: the tail on an axis of nines, times on a logarithmic one. None without latencies.
pub(crate) fn percentiles(bench: &Bench) -> Option<String> {
    let curves: Vec<(usize, Vec<(f64, f64)>)> = with_latencies(bench)
        .map(|(n, arm)| (n, arm.curve()))
        .collect();
    let points = || curves.iter().flat_map(|c| &c.1);
    points().next()?;
    let far = points().map(|p| nines(p.0)).fold(3.0, f64::max);
    let names = [
        (0.5, "50 %"),
        (0.9, "90 %"),
        (0.99, "99 %"),
        (0.999, "99.9 %"),
        (0.9999, "99.99 %"),
        (0.99999, "99.999 %"),
    ];
    let x = Axis {
        low: nines(0.5),
        high: far,
        ticks: names
            .into_iter()
            .map(|(q, name)| (nines(q), name.to_owned()))
            .filter(|(n, _)| *n <= far)
            .collect(),
        label: "share of the requests that are at least this fast",
    };
    let y = Axis::log(points().map(|p| p.1), "µs");
    let lines: Vec<Line> = curves
        .iter()
        .map(|(n, curve)| {
            (
                *n,
                curve
                    .iter()
                    .map(|(q, us)| (nines(*q), us.log10()))
                    .collect(),
            )
        })
        .collect();
    Some(chart("latency percentiles", &x, &y, &lines))
}

/// Cumulative distribution. None without latencies.
pub(crate) fn cdf(bench: &Bench) -> Option<String> {
    let curves: Vec<(usize, Vec<(f64, f64)>)> = with_latencies(bench)
        .map(|(n, arm)| (n, arm.cdf(300)))
        .collect();
    let points = || curves.iter().flat_map(|c| &c.1);
    points().next()?;
    let x = Axis::log(points().map(|p| p.0), "µs");
    let y = Axis {
        low: 0.0,
        high: 1.0,
        ticks: [0.0, 0.25, 0.5, 0.75, 1.0]
            .map(|s| (s, format!("{:.0} %", 100.0 * s)))
            .to_vec(),
        label: "share of the requests",
    };
    let lines: Vec<Line> = curves
        .iter()
        .map(|(n, curve)| {
            (
                *n,
                curve
                    .iter()
                    .map(|(us, share)| (us.log10(), *share))
                    .collect(),
            )
        })
        .collect();
    Some(chart("cumulative distribution", &x, &y, &lines))
}

fn with_latencies(bench: &Bench) -> impl Iterator<Item = (usize, &ArmResult)> {
    let arms = bench.arms.iter().enumerate();
    arms.filter(|(_, arm)| !arm.histogram.is_empty())
}

/// Horizontal bars, one an arm.
pub(crate) fn bars(title: &str, unit: &str, values: &[(String, Option<f64>)]) -> String {
    const ROW: f64 = 30.0;
    const NAMES: f64 = 120.0;
    const NUMBERS: f64 = 80.0;
    let height = ROW * values.len() as f64 + 8.0;
    let most = values
        .iter()
        .filter_map(|v| v.1)
        .fold(0.0, f64::max)
        .max(1e-12);
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    );
    for (n, (name, value)) in values.iter().enumerate() {
        let top = ROW * n as f64 + 4.0;
        let length = (WIDTH - NAMES - NUMBERS) * value.unwrap_or(0.0) / most;
        let number = match value {
            Some(v) if *v >= 100.0 => format!("{v:.0} {unit}"),
            Some(v) => format!("{v:.2} {unit}"),
            None => "–".to_owned(),
        };
        let _ = writeln!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><rect class=\"bar c{}\" x=\"{NAMES}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            NAMES - 8.0,
            top + 19.0,
            escape(name),
            n % COLOURS,
            top + 3.0,
            length.max(0.5),
            ROW - 8.0,
            NAMES + length + 6.0,
            top + 19.0,
            escape(&number)
        );
    }
    out + "</svg>\n"
}

/// Text for HTML and SVG.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::bench;
    use super::*;

    #[test]
    fn charts_have_a_curve_for_each_arm_inside_their_frame() {
        for chart in [
            percentiles(&bench()).expect("latencies"),
            cdf(&bench()).expect("latencies"),
        ] {
            assert_eq!(chart.matches("<polyline").count(), 2);
            let points = chart
                .split("points=\"")
                .skip(1)
                .filter_map(|p| p.split('"').next());
            for point in points.flat_map(str::split_whitespace) {
                let (x, y) = point.split_once(',').expect("a point");
                let (x, y): (f64, f64) = (x.parse().expect("x"), y.parse().expect("y"));
                assert!((LEFT - 0.1..=WIDTH).contains(&x), "{point}");
                assert!((TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(&y), "{point}");
            }
        }
        let mut none = bench();
        none.arms.iter_mut().for_each(|a| a.histogram.clear());
        assert!(percentiles(&none).is_none() && cdf(&none).is_none());
        assert!(panels(&none).is_empty());
    }

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(
            escape("<a b=\"c\">&'"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#39;"
        );
        assert!(bars("t", "µs", &[("<x>".to_owned(), None)]).contains("&lt;x&gt;"));
    }
}
