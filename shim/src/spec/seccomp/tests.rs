use super::model::{ORDERS, Random, lets_through};
use super::*;

const ALL: [&str; 5] = ["bind", "connect", "listen", "epoll_create", "epoll_create1"];

fn listener() -> Listener<'static> {
    Listener {
        path: "/run/kbp/notify/x/seccomp.sock",
        metadata: "kbp",
        flags: &[],
        runtime_needs: &[],
    }
}

fn config(profile: Value) -> Value {
    json!({"ociVersion": "1.0.2", "linux": {"seccomp": profile}})
}

/// Merges and returns the profile with what became of the calls.
fn merged(profile: Value) -> (Value, Merged) {
    let mut config = config(profile);
    let merged = trap(&mut config, &ALL, &listener()).expect("merge");
    (config["linux"]["seccomp"].clone(), merged)
}

#[test]
fn an_allow_list_hands_over_its_five_names() {
    // The shape of containerd's default profile: one long list, and the same names conditioned elsewhere.
    let (profile, merged) = merged(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["accept", "bind", "connect", "epoll_create", "epoll_create1", "listen", "socketcall"],
             "action": "SCMP_ACT_ALLOW", "vendor": 7},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["listen"], "action": "SCMP_ACT_ALLOW", "args": []},
        ],
    }));
    assert_eq!(merged.trapped, ALL);
    assert_eq!(
        profile,
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["accept", "socketcall"], "action": "SCMP_ACT_ALLOW", "vendor": 7},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
                {"names": ALL, "action": "SCMP_ACT_NOTIFY"},
            ],
            "listenerPath": "/run/kbp/notify/x/seccomp.sock",
            "listenerMetadata": "kbp",
        })
    );
}

#[test]
fn a_deny_list_keeps_its_denials() {
    let (profile, merged) = merged(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["listen", "mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["connect"], "action": "SCMP_ACT_KILL_PROCESS", "args": [{"index": 1, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["epoll_create1"], "action": "SCMP_ACT_LOG"},
        ],
    }));
    assert_eq!(merged.trapped, ["bind", "epoll_create"]);
    assert_eq!(merged.denied, ["listen"]);
    assert_eq!(merged.kept, ["connect", "epoll_create1"]);
    assert_eq!(profile["syscalls"].as_array().map(Vec::len), Some(4));
    assert_eq!(profile["syscalls"][0]["names"], json!(["listen", "mount"]));
}

#[test]
fn no_profile_gets_one_that_allows_the_rest_on_every_architecture() {
    for absent in [
        json!(null),
        json!({}),
        json!({"defaultAction": "", "syscalls": []}),
    ] {
        let (profile, merged) = merged(absent);
        assert_eq!(merged.trapped, ALL);
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ALLOW");
        assert_eq!(profile["architectures"], json!(ARCHITECTURES));
        assert_eq!(
            profile["syscalls"],
            json!([{"names": ALL, "action": "SCMP_ACT_NOTIFY"}])
        );
        assert_eq!(profile.get("flags"), None);
    }
    let mut without = json!({"linux": {}});
    trap(&mut without, &ALL, &listener()).expect("merge");
    assert!(without["linux"]["seccomp"].is_object());
}

#[test]
fn flags_are_added_once() {
    let flags = ["A".to_owned(), "B".to_owned()];
    let with_flags = Listener {
        flags: &flags,
        ..listener()
    };
    for (before, after) in [
        (json!(null), json!(["A", "B"])),
        (
            json!({"defaultAction": ALLOW, "flags": ["B"]}),
            json!(["B", "A"]),
        ),
        (
            json!({"defaultAction": ALLOW, "flags": null}),
            json!(["A", "B"]),
        ),
    ] {
        let mut config = config(before);
        trap(&mut config, &ALL, &with_flags).expect("merge");
        assert_eq!(config["linux"]["seccomp"]["flags"], after);
    }
}

#[test]
fn somebody_elses_listener_is_a_conflict() {
    let cases = [
        (
            json!({"defaultAction": ALLOW, "listenerPath": "/run/other.sock"}),
            "/run/other.sock",
        ),
        (
            json!({"defaultAction": ALLOW, "listenerMetadata": "theirs"}),
            "theirs",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": [{"names": ["mount"], "action": NOTIFY}]}),
            NOTIFY,
        ),
    ];
    for (profile, named) in cases {
        let before = config(profile);
        let mut after = before.clone();
        let error = trap(&mut after, &ALL, &listener())
            .expect_err("conflict")
            .to_string();
        assert!(error.contains(named), "{error}");
        assert_eq!(after, before);
    }
    for name in CRUN_OVERRIDES {
        let mut config = config(json!(null));
        config["annotations"] = json!({name: "/run/other.sock"});
        let error = trap(&mut config, &ALL, &listener())
            .expect_err("conflict")
            .to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_profile_that_locks_the_runtime_out_is_left_alone() {
    let needy = Listener {
        runtime_needs: &["wait4"],
        ..listener()
    };
    let allowing = |names: &[&str]| {
        config(
            json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": names, "action": ALLOW}]}),
        )
    };
    let mut fine = allowing(&["bind", "wait4"]);
    assert_eq!(
        trap(&mut fine, &ALL, &needy).expect("merge").trapped,
        ["bind"]
    );
    let mut own = config(json!(null));
    assert_eq!(trap(&mut own, &ALL, &needy).expect("merge").trapped, ALL);

    let before = allowing(&["bind"]);
    let mut after = before.clone();
    let error = trap(&mut after, &ALL, &needy)
        .expect_err("locked out")
        .to_string();
    assert!(error.contains("wait4"), "{error}");
    assert_eq!(after, before);
}

#[test]
fn nothing_to_trap_changes_nothing() {
    let before = config(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": ALLOW}]}),
    );
    let mut after = before.clone();
    let merged = trap(&mut after, &ALL, &listener()).expect("merge");
    assert_eq!(merged.denied, ALL);
    assert_eq!(after, before);
    trap(&mut after, &[], &listener()).expect("merge");
    assert_eq!(after, before);
}

#[test]
fn a_restricted_socketcall_keeps_the_socket_calls() {
    for action in ["SCMP_ACT_ERRNO", "SCMP_ACT_LOG"] {
        let (_, merged) = merged(
            json!({"defaultAction": ALLOW, "syscalls": [{"names": ["socketcall"], "action": action}]}),
        );
        assert_eq!(merged.kept, SOCKET_CALLS);
        assert_eq!(merged.trapped, EPOLL_CALLS);
    }
}

#[test]
fn malformed_profiles_are_refused_by_member() {
    for (profile, member) in [
        (json!(3), "linux.seccomp"),
        (
            json!({"syscalls": [{"names": ["a"], "action": ALLOW}]}),
            "defaultAction",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": {}}),
            "linux.seccomp.syscalls",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": [{"names": "bind", "action": ALLOW}]}),
            "syscalls[0].names",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": [{"names": [1], "action": ALLOW}]}),
            "syscalls[0].names",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": [{"names": ["a"]}]}),
            "syscalls[0].action",
        ),
        (
            json!({"defaultAction": ALLOW, "syscalls": [{"names": ["a"], "action": ALLOW, "args": 1}]}),
            "syscalls[0].args",
        ),
    ] {
        let before = config(profile);
        let mut after = before.clone();
        let error = trap(&mut after, &ALL, &listener())
            .expect_err("malformed")
            .to_string();
        assert!(error.contains(member), "{error}");
        assert_eq!(after, before);
    }
    for mut config in [json!({}), json!({"linux": null}), json!([])] {
        assert!(trap(&mut config, &ALL, &listener()).is_err(), "{config}");
    }
}

const ACTIONS: [&str; 8] = [
    ALLOW,
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_LOG",
];
const NAMES: [&str; 8] = [
    "bind",
    "connect",
    "listen",
    "epoll_create",
    "epoll_create1",
    "socketcall",
    "read",
    "mount",
];

fn random_profile(random: &mut Random) -> Value {
    let entries: Vec<Value> = (0..random.below(7))
        .map(|_| {
            let names: Vec<&str> = (0..=random.below(4)).map(|_| random.pick(&NAMES)).collect();
            // Plain permissions are what merges act on: make them frequent.
            let action = if random.below(2) == 0 {
                ALLOW
            } else {
                random.pick(&ACTIONS)
            };
            let mut entry = json!({"names": names, "action": action});
            if random.below(3) == 0 {
                entry["args"] =
                    json!([{"index": 0, "value": random.below(3), "op": "SCMP_CMP_EQ"}]);
            }
            entry
        })
        .collect();
    let default = if random.below(2) == 0 {
        ALLOW
    } else {
        random.pick(&ACTIONS)
    };
    json!({"defaultAction": default, "syscalls": entries})
}

#[test]
fn a_merge_lets_through_exactly_what_the_original_did() {
    let mut trapped = 0;
    for seed in 0..2_000 {
        let original = random_profile(&mut Random::new(seed));
        let (after, merged) = merged(original.clone());
        trapped += merged.trapped.len();
        for call in NAMES {
            for argument in 0..4 {
                for order in ORDERS {
                    assert_eq!(
                        lets_through(&after, call, argument, order),
                        lets_through(&original, call, argument, order),
                        "seed {seed}: {call}({argument}) by {order:?}\n{original}\n{after}"
                    );
                }
            }
        }
        // Every call is accounted for, and what is said to be denied is.
        assert_eq!(
            merged.trapped.len() + merged.denied.len() + merged.kept.len(),
            ALL.len()
        );
        for call in &merged.denied {
            assert!(
                (0..4).all(|a| ORDERS.iter().all(|o| !lets_through(&original, call, a, *o))),
                "seed {seed}: {call} is not denied by {original}"
            );
        }
    }
    assert!(
        trapped > 1_000,
        "the generator hardly ever makes a profile to act on: {trapped}"
    );
}

#[test]
fn the_model_notices_a_merge_that_allows_too_much() {
    let original = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []});
    let wrong = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bind"], "action": NOTIFY}]});
    for order in ORDERS {
        assert!(
            lets_through(&wrong, "bind", 0, order) && !lets_through(&original, "bind", 0, order)
        );
    }
}
