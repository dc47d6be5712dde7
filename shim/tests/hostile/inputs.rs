//! What takes input from outside, fed with bytes: each function may refuse them, and must not do anything else with bad ones.
//! Shared with the fuzz targets in `fuzz/shim`.

use std::io::Write;
use std::os::unix::net::UnixStream;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kbp_shim::sockets::{Notifier, Treatment};
use kbp_shim::spec::seccomp::{self, Listener};
use kbp_shim::spec::{CpuLimits, Spec};
use kbp_shim::task::options::Options;

/// Runtime options: every kind of message, and TOML in the one that carries it.
pub(crate) fn options(data: &[u8]) {
    // Field 3 (config_body), length-delimited.
    let mut carried = vec![0x1a];
    let mut length = data.len();
    while length > 0x7f {
        carried.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    carried.push(length as u8);
    carried.extend(data);
    for (name, value) in [
        ("containerd.runc.v1.Options", data.to_vec()),
        ("containerd.linux.runc.CreateOptions", data.to_vec()),
        ("runtimeoptions.v1.Options", data.to_vec()),
        ("runtimeoptions.v1.Options", carried),
        (&*String::from_utf8_lossy(data), data.to_vec()),
    ] {
        let any = Any {
            type_url: name.to_owned(),
            value,
            ..Default::default()
        };
        if let Ok(options) = Options::decode(&any) {
            // Where the runtime keeps its state stays a path below what was given.
            assert!(options.runtime_root("ns").ends_with("ns"));
        }
    }
}

/// A bundle's `config.json`, read, edited as for a container with a window, written and put back.
pub(crate) fn config(data: &[u8]) {
    let bundle = tempfile::tempdir().expect("a directory");
    let file = bundle.path().join("config.json");
    std::fs::write(&file, data).expect("write");
    let Ok(mut spec) = Spec::read(bundle.path()) else {
        return;
    };
    let _ = (spec.annotations(), spec.network());
    let limits = spec.cpu_limits();
    let _ = (limits.cpuset(), limits.quota_cpus());
    let _ = limits.updated(&CpuLimits::from_resources(spec.value()));
    let before = spec.value().clone();
    let listener = Listener {
        path: "/run/kbp/notify/0/seccomp.sock",
        metadata: "kbp ns/pod",
        flags: &[],
        runtime_needs: &["wait4"],
    };
    let merged = seccomp::trap(spec.value_mut(), &["bind", "connect"], &listener);
    match merged {
        Ok(merged) if !merged.trapped.is_empty() => {
            let after = spec.value();
            assert_eq!(after["linux"]["seccomp"]["listenerPath"], listener.path);
            let default = &before["linux"]["seccomp"]["defaultAction"];
            if default.as_str().is_some_and(|action| !action.is_empty()) {
                assert_eq!(&after["linux"]["seccomp"]["defaultAction"], default);
            }
            let again = seccomp::trap(spec.value_mut(), &["bind"], &listener);
            assert!(again.is_err() || again.is_ok_and(|m| m.trapped.is_empty()));
        }
        _ => assert_eq!(spec.value(), &before, "changed although nothing is trapped"),
    }
    spec.write().expect("write");
    spec.restore().expect("restore");
    assert_eq!(std::fs::read(&file).expect("read"), data);
}

struct Pod {
    notifier: Notifier,
    _dir: tempfile::TempDir,
}

impl Pod {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let notifier = Notifier::start(dir.path(), "ns", "pod", |_| {}).expect("a notifier");
        let treatment = Treatment {
            window: None,
            epoll: true,
            bounded: true,
            prefer: Default::default(),
        };
        notifier.admit("app", treatment);
        Self {
            notifier,
            _dir: dir,
        }
    }
}

thread_local! {
    /// One for all inputs of a test: it ends, with its directory, when the test's thread does.
    static POD: Pod = Pod::new();
}

/// What an OCI runtime sends to the notifier (a container process state), without the descriptor that it has to come with.
pub(crate) fn process_state(data: &[u8]) {
    POD.with(|Pod { notifier, .. }| {
        let mut socket = UnixStream::connect(notifier.socket()).expect("it listens");
        // It may have refused what came first.
        let _ = socket.write_all(data);
        drop(socket);
        assert_eq!(notifier.counters().calls_handled, 0);
    });
}
