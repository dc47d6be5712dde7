//! `kbpctl doctor`: everything that kbp needs, tried one by one.

mod cni;
pub(crate) mod containerd;
mod kernel;
mod node;
mod power;
pub(crate) mod program;
mod software;

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::text;
pub(crate) use power::kernel_log;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// kbp works, but gives less than it could.
    Degraded,
    /// kbp gives nothing, or pods do not start.
    Broken,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Broken => "broken",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was tried, in a word or two; stable, for scripts.
    pub(crate) name: &'static str,
    pub(crate) verdict: Verdict,
    /// What was found.
    pub(crate) found: String,
    /// What that means for latency or for the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) means: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

impl Check {
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            found: found.into(),
            means: None,
            remedy: None,
        }
    }

    pub(crate) fn degraded(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            verdict: Verdict::Degraded,
            found: found.into(),
            means: Some(means.into()),
            remedy: Some(remedy.into()),
        }
    }

    pub(crate) fn broken(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Broken,
            ..Self::degraded(name, found, means, remedy)
        }
    }

    /// Adds what a good line means.
    pub(crate) fn meaning(self, means: impl Into<String>) -> Self {
        Self {
            means: Some(means.into()),
            ..self
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    verdict: Verdict,
    checks: Vec<Check>,
}

/// The whole output and the exit status.
pub(crate) fn run(json: bool, address: &Path) -> Result<(String, u8)> {
    let report = examine(address);
    let text = if json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        render(&report)
    };
    Ok((text, report.verdict as u8))
}

/// Tries everything.
fn examine(address: &Path) -> Report {
    let privileged = nix::unistd::geteuid().is_root();
    let (config, config_check) = node::config();
    let mut checks = vec![node::privileges(privileged), config_check];
    checks.extend(kernel::checks(privileged, config.as_ref()));
    checks.extend(node::checks(config.as_ref()));
    checks.extend(power::checks(privileged, config.as_ref()));
    let (containerd, node) = containerd::checks(address);
    checks.extend(containerd);
    checks.extend(software::checks(config.as_ref(), &node));
    checks.extend(cni::checks(&node));
    report(checks)
}

fn report(checks: Vec<Check>) -> Report {
    Report {
        verdict: checks
            .iter()
            .map(|c| c.verdict)
            .max()
            .unwrap_or(Verdict::Ok),
        checks,
    }
}

fn render(report: &Report) -> String {
    const WIDTH: usize = 110;
    let names = report.checks.iter().map(|c| c.name.len()).max();
    let names = names.unwrap_or(0);
    let indent = "degraded".len() + 2 + names + 2;
    let mut out = String::new();
    for check in &report.checks {
        out += &format!(
            "{:8}  {:names$}  {}\n",
            check.verdict.word(),
            check.name,
            text::fold(&check.found, indent, WIDTH)
        );
        for (label, value) in [("means:  ", &check.means), ("remedy: ", &check.remedy)] {
            if let Some(value) = value {
                let at = indent + label.len();
                out += &format!(
                    "{}{label}{}\n",
                    " ".repeat(indent),
                    text::fold(value, at, WIDTH)
                );
            }
        }
    }
    let count = |verdict| {
        report
            .checks
            .iter()
            .filter(|c| c.verdict == verdict)
            .count()
    };
    out += &format!(
        "\n{} ok, {} degraded, {} broken\n",
        count(Verdict::Ok),
        count(Verdict::Degraded),
        count(Verdict::Broken)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_line_is_the_verdict_and_the_exit_status() {
        let ok = Check::ok("a", "there");
        let degraded = Check::degraded("b", "half there", "slower", "do x");
        let broken = Check::broken("c", "not there", "nothing", "do y");
        for (checks, verdict, status) in [
            (vec![ok.clone()], Verdict::Ok, 0),
            (vec![degraded.clone(), ok.clone()], Verdict::Degraded, 1),
            (vec![degraded, broken, ok], Verdict::Broken, 2),
        ] {
            let report = report(checks);
            assert_eq!(report.verdict, verdict);
            assert_eq!(report.verdict as u8, status);
        }
    }

    #[test]
    fn lines_are_aligned_and_say_meaning_and_remedy_below() {
        let text = render(&report(vec![
            Check::ok("short", "there"),
            Check::degraded("a longer name", "half there", "it is slower", "do x"),
        ]));
        assert_eq!(
            text,
            "ok        short          there\n\
             degraded  a longer name  half there\n\
             \u{20}                        means:  it is slower\n\
             \u{20}                        remedy: do x\n\
             \n1 ok, 1 degraded, 0 broken\n"
        );
    }

    #[test]
    fn json_names_are_stable() {
        let report = report(vec![Check::broken("x", "f", "m", "r")]);
        assert_eq!(
            serde_json::to_value(&report).expect("json"),
            serde_json::json!({"verdict": "broken", "checks": [
                {"name": "x", "verdict": "broken", "found": "f", "means": "m", "remedy": "r"}
            ]})
        );
    }
}
