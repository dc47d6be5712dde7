//! The curves: median round trip over the pause, a panel a situation, a line an arm.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use kbp_plot::{FAMILY, register_font};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::record::{Arm, Records, Situation, median};

const SIZE: (u32, u32) = (1500, 900);
/// Pauses are drawn on a logarithmic axis, which has no zero.
const ZERO_US: f64 = 10.0;

const COLOURS: [RGBColor; 8] = [
    RGBColor(120, 120, 120),
    RGBColor(38, 96, 164),
    RGBColor(34, 139, 84),
    RGBColor(148, 84, 176),
    RGBColor(214, 158, 22),
    RGBColor(20, 160, 180),
    RGBColor(220, 90, 150),
    RGBColor(90, 60, 30),
];

/// Writes `window.svg` and `window.png`.
pub(crate) fn write(directory: &Path, records: &Records) -> Result<()> {
    register_font()?;
    let svg = directory.join("window.svg");
    draw(SVGBackend::new(&svg, SIZE).into_drawing_area(), records)
        .with_context(|| format!("draw {}", svg.display()))?;
    let png = directory.join("window.png");
    draw(BitMapBackend::new(&png, SIZE).into_drawing_area(), records)
        .with_context(|| format!("draw {}", png.display()))
}

fn draw<B: DrawingBackend>(area: DrawingArea<B, Shift>, records: &Records) -> Result<()>
where
    B::ErrorType: Sync + Send + 'static,
{
    area.fill(&WHITE)?;
    let groups = records.groups();
    let situations: Vec<Situation> = groups
        .keys()
        .map(|k| k.0)
        .filter(|s| *s != Situation::Neighbour)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let panels = area.split_evenly((situations.len().div_ceil(2).max(1), 2));
    for (situation, panel) in situations.iter().zip(&panels) {
        let arms: BTreeSet<&Arm> = groups
            .keys()
            .filter(|k| k.0 == *situation)
            .map(|k| &k.1)
            .collect();
        let title = format!("p50 in µs by pause in µs: {}", situation.title());
        let mut chart = ChartBuilder::on(panel)
            .caption(title, (FAMILY, 18))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(48)
            .build_cartesian_2d((ZERO_US..12_000.0).log_scale(), (3.0..1_000.0).log_scale())?;
        chart
            .configure_mesh()
            .label_style((FAMILY, 13))
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        for (n, arm) in arms.into_iter().enumerate() {
            let colour = match arm.is_stock() {
                true => RGBColor(200, 86, 52),
                false => COLOURS[n % COLOURS.len()],
            };
            let points: Vec<(f64, f64)> = groups
                .iter()
                .filter(|(k, _)| k.0 == *situation && k.1 == *arm)
                .map(|(k, rounds)| {
                    let p50 = median(rounds, |r| r.p50_us);
                    (f64::from(k.2).max(ZERO_US), p50.clamp(3.0, 1000.0))
                })
                .collect();
            let width = if arm.is_stock() { 3 } else { 2 };
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(width)).point_size(3))?
                .label(arm.name.clone())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(width))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font((FAMILY, 13))
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    area.present()?;
    Ok(())
}
