//! The latency plot: for each workload the whole curve from the median to the far tail, every arm, as SVG and PNG. Beside it, what every
//! report of several rounds needs: their median, and one curve of all of them.

mod font;
mod rounds;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

pub use font::{FAMILY, register_font};
pub use plotters::style::RGBColor;
pub use rounds::{CurvePoint, median, over_rounds};

const INK: RGBColor = RGBColor(40, 44, 52);
const GRID: RGBColor = RGBColor(222, 224, 228);
const SIZE: (u32, u32) = (1200, 600);

/// The curves of one workload.
#[derive(Debug, Clone)]
pub struct Panel {
    /// Above the panel.
    pub title: String,
    /// One curve an arm.
    pub curves: Vec<Curve>,
}

/// The curve of one arm.
#[derive(Debug, Clone)]
pub struct Curve {
    /// In the legend.
    pub label: String,
    /// Its colour.
    pub colour: RGBColor,
    /// Over the rounds.
    pub points: Vec<CurvePoint>,
}

/// Writes `latency.svg` and `latency.png` into `directory`. Needs the font of Debian's package fonts-dejavu-core.
pub fn write(directory: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    register_font()?;
    let svg = directory.join("latency.svg");
    draw(
        SVGBackend::new(&svg, SIZE).into_drawing_area(),
        title,
        panels,
    )
    .with_context(|| format!("draw {}", svg.display()))?;
    let png = directory.join("latency.png");
    draw(
        BitMapBackend::new(&png, SIZE).into_drawing_area(),
        title,
        panels,
    )
    .with_context(|| format!("draw {}", png.display()))
}

fn draw<B: DrawingBackend>(area: DrawingArea<B, Shift>, title: &str, panels: &[Panel]) -> Result<()>
where
    B::ErrorType: Sync + Send + 'static,
{
    area.fill(&WHITE)?;
    let area = area.margin(14, 14, 18, 18);
    let area = area.titled(title, (FAMILY, 24).into_font().color(&INK))?;
    let latencies = latency_range(panels);
    for (panel, area) in panels.iter().zip(area.split_evenly((1, panels.len()))) {
        draw_panel(&area, panel, latencies.clone())?;
    }
    area.present()?;
    Ok(())
}

fn draw_panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    panel: &Panel,
    latencies: Range<f64>,
) -> Result<()>
where
    B::ErrorType: Sync + Send + 'static,
{
    let points = || panel.curves.iter().flat_map(|c| &c.points);
    let far = points().map(|p| nines(p.quantile)).fold(1.0, f64::max);
    let tail = TailAxis::up_to(far.ceil().max(3.0));
    let ticks = decade_ticks()
        .into_iter()
        .filter(|y| latencies.contains(y))
        .collect();
    let latencies = latencies.log_scale().with_key_points(ticks);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FAMILY, 19, &INK))
        .margin(6)
        .margin_right(26)
        .x_label_area_size(52)
        .y_label_area_size(78)
        .build_cartesian_2d(tail, latencies)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .x_desc("share of the requests that are at least this fast")
        .y_desc("round trip in µs")
        .axis_desc_style((FAMILY, 16, &INK))
        .label_style((FAMILY, 15, &INK))
        .x_label_formatter(&|x| percent(*x))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for curve in &panel.curves {
        let colour = curve.colour;
        let line: Vec<(f64, f64)> = curve
            .points
            .iter()
            .map(|p| (nines(p.quantile), p.median_us))
            .collect();
        // The band is the range over the rounds.
        let low = curve.points.iter().map(|p| (nines(p.quantile), p.low_us));
        let high = curve
            .points
            .iter()
            .rev()
            .map(|p| (nines(p.quantile), p.high_us));
        chart.draw_series(std::iter::once(Polygon::new(
            low.chain(high).collect::<Vec<_>>(),
            colour.mix(0.15),
        )))?;
        chart
            .draw_series(LineSeries::new(
                line.iter().copied(),
                colour.stroke_width(3),
            ))?
            .label(&curve.label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 18, y + 2)], colour.filled()));
        chart.draw_series(
            line.iter()
                .map(|point| Circle::new(*point, 4, colour.filled())),
        )?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font((FAMILY, 16, &INK))
        .draw()?;
    Ok(())
}

/// The axis of the quantiles, in [`nines`]: from the median to so many nines, with a tick at each.
struct TailAxis {
    inner: RangedCoordf64,
    end: f64,
}

impl TailAxis {
    fn up_to(end: f64) -> Self {
        Self {
            inner: (nines(0.5)..end).into(),
            end,
        }
    }
}

impl Ranged for TailAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.inner.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        let whole = (1..=9).map(f64::from).take_while(|n| *n <= self.end);
        std::iter::once(nines(0.5)).chain(whole).collect()
    }

    fn range(&self) -> Range<f64> {
        self.inner.range()
    }
}

/// 0.9 is one nine, 0.999 three: an axis on which the tail has as much room as the middle.
pub fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).log10()
}

/// The label of so many nines: `50 %`, `99.9 %`.
fn percent(nines: f64) -> String {
    let share = 100.0 * (1.0 - 10f64.powf(-nines));
    let decimals = if nines <= 2.0 {
        0
    } else {
        nines.round() as usize - 2
    };
    format!("{share:.decimals$} %")
}

/// 1, 2, 5 of every decade from 1 µs to 1 s.
fn decade_ticks() -> Vec<f64> {
    (0..6)
        .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)))
        .collect()
}

/// One range for all panels, so that they compare, a little wider than what is drawn.
fn latency_range(panels: &[Panel]) -> Range<f64> {
    let points = || {
        panels
            .iter()
            .flat_map(|p| &p.curves)
            .flat_map(|c| &c.points)
    };
    let low = points().map(|p| p.low_us).fold(f64::INFINITY, f64::min);
    let high = points().map(|p| p.high_us).fold(0.0, f64::max);
    if low.is_finite() && low > 0.0 {
        low * 0.8..high * 1.6
    } else {
        1.0..1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_has_the_usual_percentiles() {
        let labels: Vec<String> = [0.5, 0.9, 0.99, 0.999, 0.9999]
            .map(|q| percent(nines(q)))
            .into();
        assert_eq!(labels, ["50 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
    }

    #[test]
    fn both_files_are_drawn() {
        let directory = tempfile::tempdir().expect("a directory");
        let points = |scale: f64| {
            (1..=13)
                .map(|k| {
                    let median_us = scale * f64::from(k);
                    CurvePoint {
                        quantile: 1.0 - 0.5f64.powi(k),
                        low_us: 0.9 * median_us,
                        median_us,
                        high_us: 1.3 * median_us,
                    }
                })
                .collect()
        };
        let curve = |label: &str, colour, scale| Curve {
            label: label.to_owned(),
            colour,
            points: points(scale),
        };
        let panel = |title: &str| Panel {
            title: title.to_owned(),
            curves: vec![curve("stock", RED, 70.0), curve("kbp", BLUE, 12.0)],
        };
        write(directory.path(), "a title", &[panel("one"), panel("two")]).expect("draw");
        let svg = std::fs::read_to_string(directory.path().join("latency.svg")).expect("an SVG");
        for text in ["a title", "one", "two", "stock", "kbp", "99.9 %"] {
            assert!(svg.contains(text), "{text} is not in the SVG");
        }
        let png = std::fs::read(directory.path().join("latency.png")).expect("a PNG");
        assert!(png.starts_with(b"\x89PNG"));
    }
}
