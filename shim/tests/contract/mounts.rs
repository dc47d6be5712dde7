//! The root file system: mounted at creation, gone at deletion, whatever becomes of the container.

use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;

use crate::support::{World, refused};

const TERM: u32 = 15;
const KILL: u32 = 9;

#[tokio::test]
async fn a_container_that_cannot_be_made_leaves_nothing() {
    let world = World::new().await;
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

#[tokio::test]
async fn the_root_file_system_is_mounted_from_creation_to_deletion() {
    let world = World::new().await;
    let bundle = world.add_bundle_with("c", &["sleep", "1000"], |spec| {
        spec["root"]["path"] = json!("rootfs")
    });
    std::fs::create_dir_all(world.path("upper")).expect("make a directory");
    std::fs::create_dir_all(world.path("work")).expect("make a directory");
    let shim = world.start_shim("c").await;
    let mut request = world.create_request("c");
    let option = |name: &str, path: &str| format!("{name}={}", world.path(path).display());
    request.rootfs.push(api::Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![
            option("lowerdir", "rootfs"),
            option("upperdir", "upper"),
            option("workdir", "work"),
        ],
        ..Default::default()
    });
    shim.create(&request).await.expect("create");
    assert!(bundle.join("rootfs/bin/busybox").exists());
    shim.start_init("c").await;
    shim.signal("c", "", KILL).await.expect("kill");
    shim.exit_status("c", "").await;
    shim.remove("c", "").await.expect("delete");
    assert!(!bundle.join("rootfs/bin").exists());
}

#[tokio::test]
async fn layers_whose_names_fill_more_than_a_page_are_mounted() {
    let world = World::new().await;
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
    let mut request = world.create_request("c");
    request.rootfs.push(api::Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![lower],
        ..Default::default()
    });
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
