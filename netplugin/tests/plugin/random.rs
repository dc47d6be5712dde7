//! Numbers that differ from run to run, and are the same again with the seed that a run has printed.

use std::time::{SystemTime, UNIX_EPOCH};

/// xorshift64.
pub(crate) struct Random(u64);

impl Random {
    /// Prints its seed, which is that of KBP_SEED where it is set.
    pub(crate) fn new() -> Self {
        let seed = match std::env::var("KBP_SEED") {
            Ok(seed) => seed.parse().expect("KBP_SEED is a number"),
            Err(_) => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .expect("a clock")
                .subsec_nanos(),
        };
        println!("KBP_SEED={seed}");
        Self(u64::from(seed) | 1 << 40)
    }

    /// A number from 0 to below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// An index of a list of that length, which is not empty.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// One of some.
    pub(crate) fn one_of<'a, T>(&mut self, some: &'a [T]) -> &'a T {
        &some[self.index(some.len())]
    }
}
