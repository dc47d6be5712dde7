//! Two benches beside each other.

use std::path::Path;

use anyhow::{Result, bail};

use super::result::Bench;
use super::table::columns;
use crate::text;

/// The whole output.
pub(crate) fn run(a: &Path, b: &Path) -> Result<String> {
    compare(&Bench::read(a)?, &Bench::read(b)?)
}

fn compare(a: &Bench, b: &Bench) -> Result<String> {
    if a.workload != b.workload {
        bail!(
            "the first is a bench of {}, the second of {}: they have no figure in common",
            a.workload,
            b.workload
        );
    }
    let mut rows = vec![
        ["arm", "figure", "A", "B", "B / A"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for arm in &a.arms {
        let Some(other) = b.arms.iter().find(|o| o.name == arm.name) else {
            continue;
        };
        let (of_a, of_b) = (arm.summary(), other.summary());
        for (n, column) in columns(a).iter().enumerate() {
            let (Some(in_a), Some(in_b)) = ((column.value)(&of_a), (column.value)(&of_b)) else {
                continue;
            };
            let number = |v: f64| match v.abs() {
                v if v >= 1000.0 => format!("{v:.0}"),
                v if v >= 10.0 => format!("{v:.1}"),
                v => format!("{v:.3}"),
            };
            let ratio = match in_a > 0.0 {
                true => format!("{:.2}×", in_b / in_a),
                false => "-".to_owned(),
            };
            let name = if n == 0 {
                arm.name.clone()
            } else {
                String::new()
            };
            rows.push(vec![
                name,
                column.head.to_owned(),
                number(in_a),
                number(in_b),
                ratio,
            ]);
        }
    }
    if rows.len() == 1 {
        bail!("the two have no arm in common");
    }
    let mut out = format!(
        "A: {}\nB: {}\n\n{}",
        a.description,
        b.description,
        text::table(&rows)
    );
    out.push('\n');
    for note in notes(a, b) {
        out += &format!("{}\n", text::fold(&note, 2, 110));
    }
    Ok(out)
}

/// Why a difference may not be what it seems.
fn notes(a: &Bench, b: &Bench) -> Vec<String> {
    let mut notes = Vec::new();
    if a.asked != b.asked {
        notes.push("! the two were asked for different things (rounds, seconds, rate, size or interference): see both files".to_owned());
    }
    for (label, of_a) in a.machine.lines() {
        let of_b = b.machine.lines().into_iter().find(|(l, _)| *l == label);
        if let Some((_, of_b)) = of_b
            && of_a != of_b
            && label != "other work"
        {
            notes.push(format!("{label}: {of_a} / {of_b}"));
        }
    }
    for (name, bench) in [("A", a), ("B", b)] {
        notes.extend(bench.machine.warning().map(|w| format!("! {name}: {w}")));
    }
    for arm in &a.arms {
        let Some(other) = b.arms.iter().find(|o| o.name == arm.name) else {
            notes.push(format!("{}: only in A", arm.name));
            continue;
        };
        let (of_a, of_b) = (arm.summary(), other.summary());
        if of_a.quantiles.is_none() || of_b.quantiles.is_none() {
            continue;
        }
        let ((low_a, high_a), (low_b, high_b)) = (of_a.p50_range, of_b.p50_range);
        notes.push(match low_a <= high_b && low_b <= high_a {
            true => format!(
                "{}: the medians of the rounds overlap ({low_a:.1}–{high_a:.1} and {low_b:.1}–{high_b:.1} µs): that difference may be chance",
                arm.name
            ),
            false => format!(
                "{}: no median of a round of one is within those of the other ({low_a:.1}–{high_a:.1} and {low_b:.1}–{high_b:.1} µs)",
                arm.name
            ),
        });
    }
    for arm in b
        .arms
        .iter()
        .filter(|o| a.arms.iter().all(|x| x.name != o.name))
    {
        notes.push(format!("{}: only in B", arm.name));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::arm;
    use super::super::table::tests::bench;
    use super::*;

    #[test]
    fn what_both_have_is_compared_and_the_rest_is_told() {
        let (a, mut b) = (bench(), bench());
        b.arms = vec![arm("stock", 40), arm("spinner", 30)];
        b.machine.kernel = "Linux 7".to_owned();
        b.asked.seconds = 9.0;
        let text = compare(&a, &b).expect("compared");
        assert!(text.contains("0.50×"), "{text}");
        let text = notes(&a, &b).join("\n");
        for part in [
            "kernel:  / Linux 7",
            "different things",
            "kbp: only in A",
            "spinner: only in B",
            "stock: no median of a round",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let same = notes(&a, &a).join("\n");
        assert!(same.contains("may be chance"), "{same}");
        b.workload = "bulk".to_owned();
        assert!(compare(&a, &b).is_err());
    }

    #[test]
    fn a_file_of_something_else_is_refused_with_what_is_wanted() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), "[{\"arm\": \"stock\"}]").expect("write");
        let error = run(file.path(), file.path())
            .expect_err("refused")
            .to_string();
        assert!(error.contains("result.json"), "{error}");
    }
}
