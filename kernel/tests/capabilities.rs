//! Capabilities out of force: the thread does not have them, the programs that it starts have.

use std::process::Command;

use kbp_kernel::process::{Capability, give_up};

fn set(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    u64::from_str_radix(line.expect("a line").trim(), 16).expect("a set")
}

#[test]
fn what_is_given_up_is_not_in_force_here_and_is_in_programs() {
    let here = || std::fs::read_to_string("/proc/thread-self/status").expect("status");
    let child = || {
        let output = Command::new("cat").arg("/proc/self/status").output();
        String::from_utf8(output.expect("cat").stdout).expect("text")
    };
    let given_up = [Capability::SysTime, Capability::Bpf];
    let mask = given_up.iter().fold(0, |m, c| m | 1u64 << (*c as u32));
    let (before, child_before) = (here(), child());
    assert!(give_up(&given_up).expect("give up"));
    let (after, child_after) = (here(), child());
    let effective = set(&before, "CapEff:") & !mask;
    assert_eq!(set(&after, "CapEff:"), effective);
    for name in ["CapEff:", "CapPrm:", "CapInh:", "CapBnd:", "CapAmb:"] {
        assert_eq!(set(&child_after, name), set(&child_before, name), "{name}");
    }
    for name in ["CapPrm:", "CapInh:", "CapBnd:", "CapAmb:"] {
        assert_eq!(set(&after, name), set(&before, name), "{name}");
    }
    // Twice is as good as once.
    assert!(give_up(&given_up).expect("give up"));
}
