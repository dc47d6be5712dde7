//! Merged profiles are judged by what is really loaded: original and merged profile are compiled by libseccomp, the way runc does
//! it, and both filters are run on sampled calls of every architecture, with arguments.
//!
//! Needs a C compiler and libseccomp's headers.

// The architectures and call numbers that are sampled are those of such a machine.
#![cfg(target_arch = "x86_64")]

mod compiled;

use std::cell::Cell;

use compiled::{Action, Call, Filter, compile};
use kbp_shim::spec::seccomp::{self, EPOLL_CALLS, Listener, Merged, SOCKET_CALLS};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

/// The calls that kbp traps, then others: those that share a rule with them, and plain ones.
const NAMES: [&str; 12] = [
    "bind",
    "connect",
    "listen",
    "epoll_create",
    "epoll_create1",
    "socketcall",
    "socket",
    "accept4",
    "read",
    "clone",
    "personality",
    "mount",
];
const ACTIONS: [&str; 7] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_LOG",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
/// Values of conditions and of sampled arguments: the same ones, so that conditions are met and missed by one.
const VALUES: [u64; 9] = [0, 1, 2, 3, 4, 5, 40, 0x8_0000, 0x1_0000_0002];
const ARCHITECTURES: [&[&str]; 4] = [
    &[],
    &["SCMP_ARCH_X86_64"],
    &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
];
const FLAGS: [&[&str]; 2] = [&[], &["SECCOMP_FILTER_FLAG_LOG"]];
const ALL_CALLS: [&str; 5] = ["bind", "connect", "listen", "epoll_create", "epoll_create1"];

fn merge(original: &Value) -> Result<(Value, Merged), Refused> {
    let mut config = json!({ "linux": { "seccomp": original } });
    let calls = [&SOCKET_CALLS[..], &EPOLL_CALLS[..]].concat();
    let listener = Listener {
        path: "/run/kbp/notify/x/seccomp.sock",
        metadata: "kbp",
        flags: &[],
        runtime_needs: &[],
    };
    let merged =
        seccomp::trap(&mut config, &calls, &listener).map_err(|e| Refused(e.to_string()))?;
    Ok((config["linux"]["seccomp"].clone(), merged))
}

/// A merge that was refused, and why.
#[derive(Debug)]
struct Refused(String);

/// Numbers worth sampling on an architecture: the trapped calls, what they hide behind, and some neighbours.
fn samples(extra: &[(u32, [u64; 6])]) -> Vec<Call> {
    let of = |arch, numbers: &[u32]| {
        numbers
            .iter()
            .map(|number| (arch, *number))
            .collect::<Vec<_>>()
    };
    const X32: u32 = 0x4000_0000;
    let x86_64: &[u32] = &[49, 42, 50, 213, 291, 41, 288, 0, 56, 135, 165, 1000];
    let i386: &[u32] = &[361, 362, 363, 254, 329, 102, 359, 364, 3, 120, 136, 21];
    let x32: Vec<u32> = x86_64.iter().map(|n| n | X32).collect();
    let mut calls = Vec::new();
    for (arch, number) in of(compiled::X86_64, x86_64)
        .into_iter()
        .chain(of(compiled::X86_64, &x32))
        .chain(of(compiled::I386, i386))
        .chain(of(0xC000_00B7, &[200, 203]))
    {
        for first in VALUES.into_iter().chain(VALUES.map(|v| v + 1)) {
            for second in [0, 1, 2, 0x1_0000_0002] {
                calls.push(Call {
                    arch,
                    number,
                    args: [first, second, 0, 0, 0, 0],
                });
            }
        }
        calls.extend(extra.iter().map(|(_, args)| Call {
            arch,
            number,
            args: *args,
        }));
    }
    calls.extend(extra.iter().flat_map(|(number, args)| {
        [compiled::X86_64, compiled::I386].map(|arch| Call {
            arch,
            number: *number,
            args: *args,
        })
    }));
    calls
}

/// Whether `call` is one that may be handed to the listener.
fn may_be_trapped(call: &Call) -> bool {
    use kbp_kernel::syscalls::identify;
    identify(call.arch, call.number.cast_signed(), &call.args).is_some()
}

/// Expects that the merged filter does to each call what the original one does, except that calls which are trapped go to the listener
/// where they were allowed; returns how many were.
///
/// `control` is the original with an ordinary rule for the calls that are trapped. libseccomp (2.5.4 with the architecture x32) then denies
/// calls that no rule is about, such as shmctl: what the control denies as well is not the merge's doing.
fn judge(
    original: &Filter,
    merged: &Filter,
    control: Option<&Filter>,
    calls: &[Call],
) -> Result<usize, String> {
    let mut trapped = 0;
    for call in calls {
        let (before, after) = (original.run(call), merged.run(call));
        let by_any_rule = || control.is_some_and(|control| control.run(call) == after);
        let fine = before == after
            || (before == Action::ALLOW && after == Action::NOTIFY && may_be_trapped(call))
            || (before == Action::ALLOW && by_any_rule());
        if !fine {
            return Err(format!("{call:x?}: {before:x?} became {after:x?}"));
        }
        trapped += usize::from(after == Action::NOTIFY);
    }
    Ok(trapped)
}

/// Merges, compiles and judges one profile. None: the original profile cannot be loaded by any runtime, or the merge refuses it.
fn check(profile: &Value, calls: &[Call]) -> Result<Option<usize>, String> {
    // Without a profile there is no filter: everything is allowed.
    let original = match compile(profile) {
        Ok(filter) => filter,
        Err(_) => return Ok(None),
    };
    let Ok((after, merged)) = merge(profile) else {
        return Ok(None);
    };
    // A container that started before has to start after.
    let after =
        compile(&after).map_err(|e| format!("the merged profile does not load: {e}\n{after}"))?;
    let mut control = profile.clone();
    let rule = json!({"names": merged.trapped, "action": "SCMP_ACT_ERRNO"});
    if let Some(rules) = control["syscalls"].as_array_mut() {
        rules.push(rule);
    }
    let control = compile(&control).ok();
    let trapped = judge(&original, &after, control.as_ref(), calls)?;
    if merged.trapped.is_empty() && trapped > 0 {
        return Err(format!("{merged:?}, and {trapped} calls are trapped"));
    }
    Ok(Some(trapped))
}

fn condition() -> impl Strategy<Value = Value> {
    (0u32..3, select(&VALUES[..]), select(&VALUES[..]), select(&OPERATORS[..]))
        .prop_map(|(index, value, two, op)| json!({"index": index, "value": value, "valueTwo": two, "op": op}))
}

fn entry() -> impl Strategy<Value = Value> {
    let action = prop_oneof![3 => Just("SCMP_ACT_ALLOW"), 2 => select(&ACTIONS[..])];
    (
        btree_set(select(&NAMES[..]), 1..5),
        action,
        prop_oneof![3 => Just(Vec::new()), 1 => vec(condition(), 1..3)],
        option::of(1u32..40),
    )
        .prop_map(|(names, action, args, errno)| {
            let mut entry = json!({"names": names, "action": action});
            if !args.is_empty() {
                entry["args"] = args.into();
            }
            if let (Some(errno), "SCMP_ACT_ERRNO") = (errno, action) {
                entry["errnoRet"] = errno.into();
            }
            entry
        })
}

fn profile() -> impl Strategy<Value = Value> {
    let default = prop_oneof![2 => Just("SCMP_ACT_ALLOW"), 2 => Just("SCMP_ACT_ERRNO"), 1 => select(&ACTIONS[..])];
    let architectures = select(&ARCHITECTURES[..]);
    let flags = select(&FLAGS[..]);
    (default, architectures, vec(entry(), 0..7), flags).prop_map(|(default, architectures, entries, flags)| {
        json!({
            "defaultAction": default, "defaultErrnoRet": 1, "architectures": architectures, "syscalls": entries, "flags": flags,
        })
    })
}

/// libseccomp denies more calls when any rule is added here; see [`judge`].
#[test]
fn what_the_compiler_denies_beside_a_new_rule_is_told_apart() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["bind"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 0, "valueTwo": 0, "op": "SCMP_CMP_LE"}]},
            {"names": ["socketcall"], "action": "SCMP_ACT_ERRNO"},
        ],
        "flags": [],
    });
    let trapped = check(&profile, &samples(&[])).expect("nothing that the merge changes");
    assert!(trapped.is_some_and(|calls| calls > 0), "{trapped:?}");
}

/// The promise of the merge, on profiles of every shape.
#[test]
fn a_merged_filter_allows_nothing_that_the_original_denied() {
    let config = ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let extra = vec((0u32..460, prop::array::uniform6(any::<u64>())), 8);
    let (judged, trapped) = (Cell::new(0), Cell::new(0));
    let outcome = TestRunner::new(config).run(&(profile(), extra), |(profile, extra)| {
        match check(&profile, &samples(&extra)) {
            Ok(None) => {}
            Ok(Some(calls)) => {
                judged.set(judged.get() + 1);
                trapped.set(trapped.get() + usize::from(calls > 0));
            }
            Err(reason) => prop_assert!(false, "{}\n{}", reason, profile),
        }
        Ok(())
    });
    outcome.unwrap_or_else(|e| panic!("{e}"));
    let (judged, trapped) = (judged.get(), trapped.get());
    println!("{judged} of 300 profiles load, {trapped} have calls to trap");
    assert!(
        judged > 100 && trapped > 50,
        "the generator hardly ever makes a profile to act on: {judged} load, {trapped} trap"
    );
}

/// An allow-list with the shapes of containerd's and Docker's default profiles: names, conditions, an errno for a newer call.
fn default_like() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["accept4", "bind", "connect", "epoll_create", "epoll_create1", "listen", "read", "socketcall"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 2114060288u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    })
}

#[test]
fn the_shapes_that_are_met_are_trapped_and_nothing_else_changes() {
    let calls = samples(&[]);
    let localhost_deny = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mount", "listen"], "action": "SCMP_ACT_ERRNO"}],
    });
    for (name, profile, expected) in [
        ("default", default_like(), &ALL_CALLS[..]),
        (
            "a deny-list",
            localhost_deny,
            &["bind", "connect", "epoll_create", "epoll_create1"],
        ),
    ] {
        let (_, merged) = merge(&profile).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(merged.trapped, expected, "{name}");
        let trapped = check(&profile, &calls)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .expect("it loads");
        assert!(trapped > 100, "{name}: {trapped}");
    }
}

/// No profile, as of a privileged container: kbp's own lets everything through that ran without one, on every architecture.
#[test]
fn without_a_profile_everything_is_allowed_or_notified() {
    let (own, merged) = merge(&Value::Null).expect("merge");
    assert_eq!(merged.trapped, ALL_CALLS);
    let filter = compile(&own).expect("it loads");
    let mut notified = 0;
    for call in samples(&[]).iter().filter(|c| c.arch != 0xC000_00B7) {
        let action = filter.run(call);
        let expected =
            action == Action::ALLOW || (action == Action::NOTIFY && may_be_trapped(call));
        assert!(expected, "{call:x?}: {action:x?}");
        notified += usize::from(action == Action::NOTIFY);
    }
    assert!(notified > 100, "{notified}");
}

#[test]
fn an_existing_listener_is_a_conflict_and_nothing_is_changed() {
    let mut profile = default_like();
    profile["listenerPath"] = json!("/run/other.sock");
    let refused = merge(&profile).expect_err("a conflict");
    assert!(refused.0.contains("/run/other.sock"), "{}", refused.0);
}

/// The judge itself: a merge that hands a denied call to the listener, or loses a condition, does not pass.
#[test]
fn a_wrong_merge_is_noticed() {
    let original = default_like();
    let filter = compile(&original).expect("it loads");
    let mut more = original.clone();
    more["syscalls"][0]["names"] = json!(["accept4", "read", "socketcall"]);
    let denied = compile(&more).expect("it loads");
    let mut wrong = more.clone();
    wrong["syscalls"]
        .as_array_mut()
        .expect("entries")
        .push(json!({"names": ["bind"], "action": "SCMP_ACT_NOTIFY"}));
    let wrong = compile(&wrong).expect("it loads");
    assert!(judge(&denied, &wrong, None, &samples(&[])).is_err());
    let mut loose = original;
    loose["syscalls"][3]["args"] = json!([]);
    assert!(
        judge(
            &filter,
            &compile(&loose).expect("it loads"),
            None,
            &samples(&[])
        )
        .is_err()
    );
}
