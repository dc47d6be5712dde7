//! A model of what a profile lets through, to judge merges by.
//!
//! The runtime specification does not say which of several entries for one call wins. The model therefore judges by every
//! order that a runtime could reasonably use, and a merge has to hold under each.

use serde_json::Value;

/// Which of the entries that match a call decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// One without conditions, else the first (libseccomp).
    UnconditionalFirst,
    /// The first.
    First,
    /// The last.
    Last,
    /// The least permissive (the kernel, between filters).
    Strictest,
    /// The most permissive.
    Mildest,
}

pub(super) const ORDERS: [Order; 5] = [
    Order::UnconditionalFirst,
    Order::First,
    Order::Last,
    Order::Strictest,
    Order::Mildest,
];

/// Whether a profile lets a call with this first argument through. A notified call ends as an allowed one; a traced one is
/// not let through without a tracer.
pub(super) fn lets_through(profile: &Value, call: &str, argument: u64, order: Order) -> bool {
    let default = profile["defaultAction"].as_str().unwrap_or_default();
    let empty = Vec::new();
    let matching: Vec<&Value> = profile["syscalls"]
        .as_array()
        .unwrap_or(&empty)
        .iter()
        .filter(|e| {
            e["names"]
                .as_array()
                .is_some_and(|n| n.iter().any(|n| n == call))
        })
        .filter(|e| {
            conditions(e)
                .iter()
                .all(|c| c["index"] != 0 || c["value"] == argument)
        })
        .collect();
    let passes = |e: &&Value| passes(e["action"].as_str().unwrap_or_default());
    let mut entries = matching.iter().copied();
    match order {
        Order::UnconditionalFirst => matching
            .iter()
            .copied()
            .find(|e| conditions(e).is_empty())
            .or_else(|| entries.next())
            .map(|e| passes(&e)),
        Order::First => entries.next().map(|e| passes(&e)),
        Order::Last => entries.next_back().map(|e| passes(&e)),
        Order::Strictest if matching.is_empty() => None,
        Order::Strictest => Some(entries.all(|e| passes(&e))),
        Order::Mildest if matching.is_empty() => None,
        Order::Mildest => Some(entries.any(|e| passes(&e))),
    }
    .unwrap_or_else(|| self::passes(default))
}

fn conditions(entry: &Value) -> &[Value] {
    entry["args"].as_array().map_or(&[], Vec::as_slice)
}

fn passes(action: &str) -> bool {
    matches!(
        action,
        "SCMP_ACT_ALLOW" | "SCMP_ACT_NOTIFY" | "SCMP_ACT_LOG"
    )
}

/// A small generator of pseudo-random numbers (xorshift64*), so that a failing case can be had again by its seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
