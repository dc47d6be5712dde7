//! sockperf between two containers, beside our own measurement.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Job, Node, Pod, SHARED, START};

impl Node {
    /// The same question to a tool that is not ours, in the same containers.
    pub(super) fn sockperf(&self, server: &Pod, client: &Pod, job: &Job) -> Result<(f64, f64)> {
        const PORT: &str = "11111";
        let size = job.size.max(14).to_string();
        // In the background of a shell that ends: of a detached exec containerd 1.6 keeps the pipes for good.
        let serve =
            format!("sockperf server --ip 0.0.0.0 --port {PORT} </dev/null >/dev/null 2>&1 &");
        self.ctr
            .exec(&server.id, "sockperf", &["sh", "-c", &serve], START)?
            .good()?;
        let to = server.address.to_string();
        // It takes whole seconds only; fewer than ours, so that --quick stays quick.
        let seconds = job.seconds.floor().max(1.0).to_string();
        let out = format!("sockperf-{}", self.count);
        // Bound to a port: left alone, sockperf's UDP client neither binds nor connects, so kbp never sees its socket; kbpctl's connects.
        // Again where its server was not there yet, or a second held too few requests for its taste.
        // Into a file: what ctr prints of a process that ends is not always whole.
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do sockperf ping-pong --ip {to} --port {PORT} --time {seconds} --msg-size {size} --full-rtt --client_port 11112 >{SHARED}/{out} 2>&1; grep -q percentile {SHARED}/{out} && exit; sleep 0.1; done"
        );
        let limit = Duration::from_secs_f64(10.0 * job.seconds.ceil()) + START;
        let said = self
            .ctr
            .exec(&client.id, "sockperf", &["sh", "-c", &script], limit)?;
        let text = std::fs::read_to_string(self.shared().join(&out)).unwrap_or_default();
        percentiles(&text).with_context(|| {
            format!(
                "sockperf gave no percentiles (is it installed?): {text} {}",
                said.stderr
            )
        })
    }
}

/// Median and 99th percentile, in µs.
fn percentiles(text: &str) -> Option<(f64, f64)> {
    let at = |percentile: &str| {
        let line = text
            .lines()
            .find(|l| l.contains(&format!("percentile {percentile} =")))?;
        line.split('=').nth(1)?.trim().parse().ok()
    };
    Some((at("50.000")?, at("99.000")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockperfs_words_are_understood() {
        let text = "sockperf: ---> <MAX> observation =  100.1\nsockperf: ---> percentile 99.000 =   30.250\nsockperf: ---> percentile 50.000 =   12.345\n";
        assert_eq!(percentiles(text), Some((12.345, 30.25)));
        assert_eq!(percentiles("sockperf: ERROR"), None);
    }
}
