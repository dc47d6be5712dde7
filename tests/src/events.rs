//! What containerd tells of its tasks.

use crate::command::{Running, wait_until};
use crate::lab::{LIMIT, Lab};
use crate::run::Runtime;

/// The events since a subscription.
#[derive(Debug)]
pub struct Events {
    running: Running,
}

impl Events {
    /// Starts `ctr events` and returns once it has subscribed. It does not say when: events are made until one is seen.
    pub fn subscribe(lab: &Lab<'_>) -> Self {
        let mut running = lab.containerd.ctr_start(["events"]).expect("events");
        wait_until("a first event", LIMIT, || {
            let label = ["namespaces", "label", lab.sandbox.name(), "seen=no"];
            lab.containerd.ctr(label).map_err(|e| e.to_string())?;
            if running.stdout().is_empty() {
                Err("none".to_owned())
            } else {
                Ok(())
            }
        })
        .expect("subscribed");
        Self { running }
    }

    /// The events of a container's task, each as a line of text.
    pub fn of(&mut self, container: &str) -> Vec<String> {
        let about = format!("\"container_id\":\"{container}\"");
        let lines = self.running.stdout().lines();
        lines
            .filter(|line| line.contains(&about) && line.contains(" /tasks/"))
            .map(str::to_owned)
            .collect()
    }

    /// Topics of a container's events so far, in order, e.g. `/tasks/start`.
    pub fn topics(&mut self, container: &str) -> Vec<String> {
        let topic = |line: String| {
            let mut words = line.split_whitespace();
            words.find(|w| w.starts_with("/tasks/")).map(str::to_owned)
        };
        self.of(container).into_iter().filter_map(topic).collect()
    }

    /// Waits for the events of a container and expects exactly these, in this order; without `/tasks/`.
    pub fn expect(&mut self, lab: &Lab<'_>, container: &str, expected: &[&str]) {
        let expected: Vec<String> = expected.iter().map(|t| format!("/tasks/{t}")).collect();
        // On a busy machine the stock shim has ended before its last event, the deletion, is sent.
        let enough = expected.len() - usize::from(lab.arm.runtime == Runtime::Stock);
        let seen = wait_until("all events", LIMIT, || {
            let seen = self.topics(container);
            if seen.len() >= enough {
                Ok(seen)
            } else {
                Err(format!("{seen:?}"))
            }
        })
        .expect("events");
        assert_eq!(seen, expected[..seen.len().min(expected.len())]);
    }
}
