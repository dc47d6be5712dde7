//! The root file system: mounted at creation, gone at deletion, whatever becomes of the container.

use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;

use crate::support::{Arm, World, arms, refused};

arms!(
    [kbp kbp_with_crun stock_1 stock_2]: [
        a_container_that_cannot_be_made_leaves_nothing,
        the_root_file_system_is_mounted_from_creation_to_deletion,
        layers_whose_names_fill_more_than_a_page_are_mounted,
    ],
    // containerd 1.6 knows nothing of mapped owners.
    [kbp kbp_with_crun stock_2]: [a_user_namespace_s_root_file_system_shows_mapped_owners],
);

const TERM: u32 = 15;
const KILL: u32 = 9;

/// The layers of [`overlay_request`]: the world's root file system below, directories of the world above.
fn upper_and_work(world: &World) -> Vec<String> {
    let layers = [
        ("lowerdir", "rootfs"),
        ("upperdir", "upper"),
        ("workdir", "work"),
    ];
    let option = |(name, path): (&str, &str)| format!("{name}={}", world.path(path).display());
    layers.map(option).to_vec()
}

/// A container whose root file system is an overlay.
fn overlay_request(world: &World, id: &str, options: Vec<String>) -> api::CreateTaskRequest {
    let mut request = world.create_request(id);
    request.rootfs.push(api::Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options,
        ..Default::default()
    });
    request
}

async fn a_container_that_cannot_be_made_leaves_nothing(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle_with("c", &["true"], |spec| {
        spec["process"]["args"] = json!(["/nonesuch"])
    });
    let shim = world.start_shim("c").await;
    let mut request = world.create_request("c");
    request.rootfs.push(api::Mount {
        type_: "bind".to_owned(),
        source: world.path("rootfs").display().to_string(),
        options: vec!["rbind".to_owned(), "ro".to_owned()],
        ..Default::default()
    });
    let (_, message) = refused(shim.create(&request).await);
    assert!(
        message.starts_with("OCI runtime create failed: ") && message.contains("/nonesuch"),
        "{message}"
    );
    assert_eq!(refused(shim.signal("c", "", TERM).await).0, Code::NOT_FOUND);
    shim.end().await;
    assert_eq!(world.leftovers("c"), [""; 0]);
    assert_eq!(world.topics(), [""; 0], "nothing was created");
}

async fn the_root_file_system_is_mounted_from_creation_to_deletion(arm: Arm) {
    let world = World::new(arm).await;
    let bundle = world.add_bundle_with("c", &["sleep", "1000"], |spec| {
        spec["root"]["path"] = json!("rootfs")
    });
    std::fs::create_dir_all(world.path("upper")).expect("make a directory");
    std::fs::create_dir_all(world.path("work")).expect("make a directory");
    let shim = world.start_shim("c").await;
    let request = overlay_request(&world, "c", upper_and_work(&world));
    shim.create(&request).await.expect("create");
    assert!(bundle.join("rootfs/bin/busybox").exists());
    shim.start_init("c").await;
    shim.signal("c", "", KILL).await.expect("kill");
    shim.exit_status("c", "").await;
    shim.remove("c", "").await.expect("delete");
    assert!(!bundle.join("rootfs/bin").exists());
}

async fn layers_whose_names_fill_more_than_a_page_are_mounted(arm: Arm) {
    let world = World::new(arm).await;
    let bundle = world.add_bundle_with("c", &["true"], |spec| {
        spec["root"]["path"] = json!("rootfs")
    });
    let layers = world.path("a-directory-with-a-long-name-that-all-of-the-layers-have-in-common");
    let base = layers.join("base");
    std::fs::create_dir_all(&layers).expect("make a directory");
    std::fs::rename(world.path("rootfs"), &base).expect("move the base");
    let mut lower = vec![base.display().to_string()];
    for layer in 0..100 {
        let path = layers.join(layer.to_string());
        std::fs::create_dir_all(path.join(format!("from-{layer}"))).expect("make a layer");
        lower.insert(0, path.display().to_string());
    }
    let lower = format!("lowerdir={}", lower.join(":"));
    assert!(lower.len() > 4096);
    let shim = world.start_shim("c").await;
    let request = overlay_request(&world, "c", vec![lower]);
    shim.create(&request).await.expect("create");
    assert!(bundle.join("rootfs/from-0").exists() && bundle.join("rootfs/from-99").exists());
    shim.remove("c", "").await.expect("delete");
    assert_eq!(
        std::fs::read_dir(bundle.join("rootfs"))
            .expect("the mount point")
            .count(),
        0
    );
}

/// What containerd 2 asks for with a user namespace: layers whose owners are mapped, not changed on disk.
async fn a_user_namespace_s_root_file_system_shows_mapped_owners(arm: Arm) {
    use std::os::unix::fs::MetadataExt;
    const OUTSIDE: u32 = 200_000;
    let world = World::new(arm).await;
    let bundle = world.add_bundle_with(
        "c",
        &["sh", "-c", "echo x >/new; exec sleep 1000"],
        |spec| {
            spec["root"]["path"] = json!("rootfs");
            let map = json!([{ "containerID": 0, "hostID": OUTSIDE, "size": 65_536 }]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            namespaces
                .expect("an array")
                .push(json!({ "type": "user" }));
        },
    );
    for name in ["upper", "work"] {
        let path = world.path(name);
        std::fs::create_dir_all(&path).expect("make a directory");
        // As the snapshotter does.
        std::os::unix::fs::chown(&path, Some(OUTSIDE), Some(OUTSIDE)).expect("chown");
    }
    // Every directory on the way is to be passed by the container's root.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(world.path(""), open).expect("chmod");
    let shim = world.start_shim("c").await;
    let mut layers = upper_and_work(&world);
    layers.push(format!("uidmap=0:{OUTSIDE}:65536"));
    let options = [&layers[..], &[format!("gidmap=0:{OUTSIDE}:65536")]].concat();
    let request = overlay_request(&world, "c", options);
    shim.create(&request).await.expect("create");
    let owner = |path: std::path::PathBuf| {
        let meta = std::fs::metadata(&path).expect("a file");
        (meta.uid(), meta.gid())
    };
    assert_eq!(owner(world.path("rootfs/bin/busybox")), (0, 0), "on disk");
    let shown = owner(bundle.join("rootfs/bin/busybox"));
    assert_eq!(shown, (OUTSIDE, OUTSIDE), "in the container's view");
    assert!(!bundle.join("rootfs.layers").exists(), "they are not left");
    shim.start_init("c").await;
    crate::support::until("the file", || world.path("upper/new").exists()).await;
    assert_eq!(owner(world.path("upper/new")), (OUTSIDE, OUTSIDE));
    shim.signal("c", "", KILL).await.expect("kill");
    shim.exit_status("c", "").await;
    shim.remove("c", "").await.expect("delete");
    shim.end().await;
    assert_eq!(world.leftovers("c"), [""; 0]);

    // One that says nothing of groups is refused, and leaves nothing; a stock shim maps half of the owners.
    if !arm.is_kbp() {
        return;
    }
    world.add_bundle("half", &["true"]);
    let shim = world.start_shim("half").await;
    let half = overlay_request(&world, "half", layers);
    let (code, message) = refused(shim.create(&half).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("give uidmap and gidmap"), "{message}");
    shim.end().await;
    assert_eq!(world.leftovers("half"), [""; 0]);
}
