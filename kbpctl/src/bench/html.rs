//! One file that shows everything: no scripts, nothing from elsewhere, readable on a phone and in the dark.

use std::fmt::Write;

use super::result::Bench;
use super::svg::{self, escape};
use super::table;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #22262c; --faint: #5b626c; --paper: #ffffff; --grid: #e0e3e8; --warn: #a33c00;
  --c0: #c85634; --c1: #2660a4; --c2: #787878; --c3: #1e8c5a; --c4: #9650a0; --c5: #be8c14; --c6: #148ca0; --c7: #aa325a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #a2a9b3; --paper: #16181c; --grid: #353a42; --warn: #ffb27a;
  --c0: #f08a68; --c1: #6fa8ee; --c2: #a8a8a8; --c3: #5ecb98; --c4: #d18fdb; --c5: #e6bd55; --c6: #5cc6d8; --c7: #ea7fa4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.25; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0; min-width: 0; } svg { display: block; width: 100%; height: auto; }
.tick { font: 12px system-ui, sans-serif; fill: var(--faint); } .axis { font: 13px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--grid); } .curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.08em; border-radius: 2px; }
.scroll { overflow-x: auto; } table { font-size: .85rem; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { color: var(--faint); } dd { margin: 0; min-width: 0; }
.warn { color: var(--warn); font-weight: 600; }
";

/// The whole file.
pub(crate) fn render(bench: &Bench) -> String {
    let mut out = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <link rel=\"icon\" href=\"data:,\">\n",
    );
    let title = format!("kbpctl bench {}", bench.workload);
    let _ = writeln!(out, "<title>{}</title>\n<style>{STYLE}", escape(&title));
    for n in 0..svg::COLOURS {
        let _ = writeln!(
            out,
            ".curve.c{n} {{ stroke: var(--c{n}); }} .bar.c{n} {{ fill: var(--c{n}); }} i.c{n} {{ background: var(--c{n}); }}"
        );
    }
    let _ = writeln!(
        out,
        "</style>\n</head>\n<body>\n<h1>{}</h1>\n<p>{}</p>",
        escape(&title),
        escape(&bench.description)
    );
    if let Some(warning) = bench.machine.warning() {
        let _ = writeln!(out, "<p class=\"warn\">{}</p>", escape(&warning));
    }
    out += "<ul class=\"legend\">\n";
    for (n, arm) in bench.arms.iter().enumerate() {
        let _ = writeln!(
            out,
            "<li><i class=\"c{}\"></i><b>{}</b>: {}</li>",
            n % svg::COLOURS,
            escape(&arm.name),
            escape(&arm.what)
        );
    }
    out += "</ul>\n<div class=\"charts\">\n";
    for (title, chart) in charts(bench) {
        let _ = writeln!(out, "<figure><h2>{}</h2>\n{chart}</figure>", escape(&title));
    }
    out += "</div>\n<h2>Figures</h2>\n<div class=\"scroll\"><table>\n";
    for (n, row) in table::rows(bench).iter().enumerate() {
        let tag = if n == 0 { "th" } else { "td" };
        let cells: String = row
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect();
        let _ = writeln!(out, "<tr>{cells}</tr>");
    }
    out += "</table></div>\n<ul>\n";
    for note in table::notes(bench) {
        match note.strip_prefix("! ") {
            Some(warning) => {
                let _ = writeln!(out, "<li class=\"warn\">{}</li>", escape(warning));
            }
            None => {
                let _ = writeln!(out, "<li>{}</li>", escape(&note));
            }
        }
    }
    out += "</ul>\n<h2>Machine</h2>\n<dl>\n";
    for (label, value) in bench.machine.lines() {
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(label), escape(&value));
    }
    out + "</dl>\n</body>\n</html>\n"
}

fn charts(bench: &Bench) -> Vec<(String, String)> {
    let bars = |title: &str, unit: &str, value: &dyn Fn(&super::result::Summary) -> Option<f64>| {
        let values: Vec<(String, Option<f64>)> = bench
            .arms
            .iter()
            .map(|a| (a.name.clone(), value(&a.summary())))
            .collect();
        (title.to_owned(), svg::bars(title, unit, &values))
    };
    let mut charts = Vec::new();
    match bench.workload.as_str() {
        "bulk" => charts.push(bars("Throughput", "Gbit/s", &|s| Some(s.gbit))),
        "pps" => charts.push(bars("Datagrams that arrived, a second", "", &|s| {
            Some(s.achieved_rate)
        })),
        _ => {
            charts.extend(svg::percentiles(bench).map(|c| ("Latency percentiles".to_owned(), c)));
            charts.extend(svg::cdf(bench).map(|c| ("Cumulative distribution".to_owned(), c)));
        }
    }
    charts.push(bars("CPUs busy, of the whole machine", "", &|s| {
        Some(s.cpus_busy)
    }));
    charts.push(match bench.workload.as_str() {
        "bulk" => bars("CPU for each gigabyte", "s", &|s| s.cpu_s_per_gbyte),
        "pps" => bars("CPU for each datagram that arrived", "µs", &|s| {
            s.cpu_us_each
        }),
        _ => bars("CPU for each request", "µs", &|s| s.cpu_us_each),
    });
    charts
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::bench;
    use super::*;

    #[test]
    fn the_report_stands_alone() {
        let html = render(&bench());
        for nothing in ["http:", "https:", "<script", "src=", "@import", "url("] {
            assert!(!html.contains(nothing), "{nothing}");
        }
        for part in [
            "a &lt;test&gt;",
            "prefers-color-scheme: dark",
            "width=device-width",
            "<polyline",
            "kbp / stock",
        ] {
            assert!(html.contains(part), "{part}");
        }
        assert_eq!(html.matches("<svg").count(), 4);
    }

    /// What a browser would have to guess about is drawn otherwise by each of them.
    #[test]
    fn every_element_is_closed_in_its_order() {
        const VOID: [&str; 2] = ["meta", "link"];
        for workload in ["rtt", "pps", "bulk"] {
            let mut bench = bench();
            bench.workload = workload.to_owned();
            let html = render(&bench);
            let mut open = Vec::new();
            for tag in html.split('<').skip(1) {
                let (tag, _) = tag.split_once('>').expect("an end of the tag");
                let name = tag.split_whitespace().next().unwrap_or_default();
                assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
                if let Some(name) = name.strip_prefix('/') {
                    assert_eq!(open.pop(), Some(name), "</{name}>");
                } else if !tag.ends_with('/') && !tag.starts_with('!') && !VOID.contains(&name) {
                    open.push(name);
                }
            }
            assert_eq!(open, Vec::<&str>::new());
            for attribute in ["x1", "y1", "x2", "y2", "width", "height", "points"] {
                let begin = format!(" {attribute}=\"");
                let values = html.split(begin.as_str()).skip(1);
                for value in values.filter_map(|v| v.split('"').next()) {
                    let number = |v: &str| v.parse::<f64>().is_ok_and(f64::is_finite);
                    let numbers = value.split([' ', ',']);
                    assert!(numbers.into_iter().all(number), "{attribute}: {value}");
                }
            }
        }
    }
}
