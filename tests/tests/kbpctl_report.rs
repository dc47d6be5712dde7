//! `kbpctl report` on a node full of secrets: what a fault is about is in the archive, and none of the secrets is.

use kbp_tests::binaries::kbp_binary;
use kbp_tests::lab::{LIMIT, on_with};
use kbp_tests::{Arm, Settings, command, wait_until};

/// In every place where somebody may keep one.
const SECRET: &str = "hunter2";

#[test]
fn an_archive_has_what_a_fault_is_about_and_no_secrets() {
    let settings = Settings {
        cri: true,
        config: format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r.example\".auth]\nusername = \"joe\"\npassword = \"{SECRET}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kbp]\nruntime_type = \"io.containerd.kbp.v1\"\n\
             pod_annotations = [\"kbp.io/*\"]\n"
        ),
        kbp_config: format!("# api_token = {SECRET}\nworker = \"none\"\n"),
        environment: vec![("REGISTRY_TOKEN".to_owned(), SECRET.to_owned())],
        ..Settings::default()
    };
    on_with(Arm::KBP, settings, |lab| {
        let networks = lab.sandbox.dir().join("net.d");
        std::fs::create_dir(&networks).expect("mkdir");
        let list = format!(
            r#"{{"cniVersion":"1.0.0","name":"office","plugins":[{{"type":"kbp","ipam":{{"type":"kbp-local"}}}},{{"type":"vpn","password":"{SECRET}","env":["A={SECRET}"]}}]}}"#
        );
        std::fs::write(networks.join("10-office.conflist"), list).expect("network");
        let pod = lab.pod("pod");
        let run = lab
            .script("server", "sleep 1000")
            .netns(&pod.netns.path())
            .annotation("vault.example/password", SECRET)
            .flag("--env", format!("DB_PASSWORD={SECRET}"));
        lab.containerd.start_container(run).expect("server");
        wait_until("the pod's state", LIMIT, || {
            lab.state("server").map(drop).ok_or(String::new())
        })
        .expect("state");

        let out = lab.sandbox.dir().join("report.tar");
        let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
        let mut report = lab.containerd.command(kbpctl);
        report
            .args(["report", "--out"])
            .arg(&out)
            .env("NETCONFPATH", &networks)
            .env("MY_SECRET", SECRET);
        let output = command::run(report, LIMIT).expect("report").success();
        let said = output.expect("report").stdout;
        assert!(said.contains("status.json"), "{said}");
        let archive = std::fs::read(&out).expect("archive");
        let archive = String::from_utf8_lossy(&archive);
        let leak = archive.lines().find(|l| l.contains(SECRET));
        assert_eq!(leak, None, "a secret is in the archive");
        for part in [
            "/doctor.json",
            "/containerd.json",
            "/cni/10-office.conflist",
            "\"id\": \"server\"",
            "\"office\"",
            "io.containerd.kbp.v1",
            "worker = \"none\"",
            "pidfd-getfd",
            "[removed]",
        ] {
            assert!(archive.contains(part), "{part} is not in the archive");
        }
        lab.containerd.remove("server").expect("remove");
    });
}
