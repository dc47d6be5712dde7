//! Everything that the daemon reads of what a client sends: frames, ttrpc's request, and each method's message.
#![no_main]

use kbp_poller::api::{
    self, AttachRequest, DetachRequest, ListRequest, MAX_ANSWER, Request, UpdateRequest,
    WatchRequest,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some((frame, used))) = api::next_frame(rest) {
        assert!(frame.payload.len() <= MAX_ANSWER && used <= rest.len());
        assert_eq!(frame.encode(), rest[..used], "what was read is what is written");
        if let Ok(request) = Request::decode(frame.payload.as_slice()) {
            methods(&request.payload);
        }
        rest = &rest[used..];
    }
    methods(bytes);
});

fn methods(payload: &[u8]) {
    if let Ok(attach) = AttachRequest::decode(payload) {
        let _ = attach.cpuset.parse::<kbp_poller::CpuSet>();
        let _ = api::read_degraded(&attach.degraded);
        let _ = attach.sockets.as_ref().map(api::read_sockets);
    }
    if let Ok(update) = UpdateRequest::decode(payload) {
        let _ = api::read_degraded(&update.degraded);
    }
    let _ = DetachRequest::decode(payload);
    let _ = ListRequest::decode(payload);
    let _ = WatchRequest::decode(payload);
}
