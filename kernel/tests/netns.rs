//! Network namespaces on the running kernel. Needs root.

use std::path::{Path, PathBuf};
use std::{fs, panic, process};

use kbp_kernel::Error;
use kbp_kernel::netns::Netns;
use nix::sys::stat::Mode;

/// A path below the temporary directory that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("kbp-netns-{}-{name}", process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_new_namespace_differs_from_ours_and_from_the_next() {
    let ours = Netns::current().expect("own namespace");
    let first = Netns::create().expect("first");
    let second = Netns::create().expect("second");
    assert!(!first.is_same(&ours).expect("compare"));
    assert!(!first.is_same(&second).expect("compare"));
    assert!(
        first
            .is_same(&first.try_clone().expect("clone"))
            .expect("compare")
    );
    let again = Netns::current().expect("own namespace");
    assert!(
        again.is_same(&ours).expect("compare"),
        "creating one moved the caller"
    );
    let by_pid = Netns::of_process(process::id()).expect("by pid");
    assert!(by_pid.is_same(&ours).expect("compare"));
}

#[test]
fn run_enters_and_returns() {
    let inside = Netns::create().expect("create");
    let home = Netns::current().expect("own");
    let seen = inside
        .run(|| Netns::current().expect("inside"))
        .expect("run");
    assert!(seen.is_same(&inside).expect("compare"));
    assert!(
        Netns::current()
            .expect("own")
            .is_same(&home)
            .expect("compare")
    );
    let devices = inside
        .run(|| fs::read_to_string("/proc/thread-self/net/dev"))
        .expect("run");
    let names: Vec<_> = devices
        .expect("read")
        .lines()
        .skip(2)
        .map(|l| l.split(':').next().unwrap_or_default().trim().to_owned())
        .collect();
    assert_eq!(names, ["lo"]);
}

#[test]
fn run_returns_after_a_panic() {
    let inside = Netns::create().expect("create");
    let home = Netns::current().expect("own");
    let result = panic::catch_unwind(|| inside.run(|| panic!("on purpose")));
    assert!(result.is_err());
    assert!(
        Netns::current()
            .expect("own")
            .is_same(&home)
            .expect("compare")
    );
}

#[test]
fn runs_nest() {
    let outer = Netns::create().expect("outer");
    let inner = Netns::create().expect("inner");
    let after_inner = outer
        .run(|| {
            inner.run(|| ()).expect("inner run");
            Netns::current().expect("current")
        })
        .expect("outer run");
    assert!(after_inner.is_same(&outer).expect("compare"));
}

#[test]
fn what_is_not_a_network_namespace_is_refused() {
    let file = Scratch::new("file");
    fs::write(&file.0, "").expect("write");
    let error = Netns::open(&file.0).expect_err("a plain file");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert!(
        error.to_string().contains(&file.0.display().to_string()),
        "{error}"
    );

    let error = Netns::open(Path::new("/proc/self/ns/uts")).expect_err("a UTS namespace");
    assert!(error.to_string().contains("another type"), "{error}");

    // A fifo without a writer must not hang the caller.
    let fifo = Scratch::new("fifo");
    nix::unistd::mkfifo(&fifo.0, Mode::S_IRUSR | Mode::S_IWUSR).expect("mkfifo");
    assert!(matches!(Netns::open(&fifo.0), Err(Error::Invalid { .. })));
}

#[test]
fn a_missing_namespace_is_named() {
    let error = Netns::open(Path::new("/run/netns/kbp-does-not-exist")).expect_err("missing");
    assert_eq!(error.errno(), Some(libc::ENOENT));
    let text = error.to_string();
    assert!(text.contains("/run/netns/kbp-does-not-exist"), "{text}");
    assert!(text.contains("No such file"), "{text}");
}
