//! The messages of nf_tables that kbp sends, for the table of one name.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, GenMessage, Hook,
    HookNumber, InetHookNumber, ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator,
    Payload, Register, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute,
    SetElementFlags, SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute,
    TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use super::family::Family;
use super::{ranges, read};
use crate::netlink::Request;

const CHAIN: &str = "postrouting";
/// `NF_IP_PRI_NAT_SRC`, which nft(8) calls srcnat.
const PRIORITY: i32 = 100;
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
const NETWORK_HEADER: u32 = 1;
/// `NFT_LOOKUP_F_INV`: matches what is not in the set.
const NOT_IN_SET: u32 = 1;

// linux/netfilter/nfnetlink.h
const NFNL_MSG_BATCH_BEGIN: u8 = 16;
const NFNL_BATCH_GENID: u16 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Messages for one table.
#[derive(Debug)]
pub(super) struct Messages {
    name: String,
}

impl Messages {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
        }
    }

    /// The table, for errors.
    pub(super) fn table(&self) -> String {
        format!("nftables table inet {}", self.name)
    }

    /// Opens a transaction; with a generation, one that fails with ERESTART on any other.
    pub(super) fn begin(&self, generation: Option<u32>) -> Request {
        let attributes = generation
            .map(|id| DefaultNla::new(NFNL_BATCH_GENID, id.to_be_bytes().to_vec()))
            .into_iter()
            .collect();
        let message_type = NFNL_MSG_BATCH_BEGIN;
        self.frame(ControlMessage::Other {
            message_type,
            attributes,
        })
    }

    /// Closes a transaction.
    pub(super) fn end(&self) -> Request {
        self.frame(ControlMessage::BatchEnd)
    }

    fn frame(&self, message: ControlMessage) -> Request {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
        let message = NetfilterMessage::new(header, message);
        Request::new(format!("change {}", self.table()), &message)
    }

    /// Table, sets, chain and rules. What is there stays, only the rules are written anew: a rule
    /// has no name, so adding one that is there would double it.
    pub(super) fn structure(&self) -> Vec<Request> {
        let mut requests = vec![self.create_table()];
        for (index, family) in Family::ALL.into_iter().enumerate() {
            let ids = [1 + 2 * index as u32, 2 + 2 * index as u32];
            requests.push(self.create_set(family.pods, family, SetFlags::empty(), ids[0]));
            requests.push(self.create_set(family.local, family, SetFlags::Interval, ids[1]));
        }
        requests.push(self.create_chain());
        let attributes = self.of_chain();
        let flush = NfTablesMessage::DeleteRule(RuleMessage { attributes });
        requests.push(self.request("empty chain postrouting".to_owned(), 0, flush));
        requests.extend(Family::ALL.map(|family| self.create_rule(family)));
        requests
    }

    /// Creates the table; changes nothing when it is there.
    pub(super) fn create_table(&self) -> Request {
        let attributes = vec![TableAttribute::Name(self.name.clone())];
        let table = NfTablesMessage::NewTable(TableMessage { attributes });
        self.create("the table".to_owned(), table)
    }

    fn create_set(&self, set: &str, family: &Family, flags: SetFlags, id: u32) -> Request {
        let attributes = vec![
            SetAttribute::Table(self.name.clone()),
            SetAttribute::Name(set.to_owned()),
            SetAttribute::Flags(flags),
            SetAttribute::KeyType(family.key_type),
            SetAttribute::KeyLen(family.length),
            SetAttribute::Id(id),
        ];
        self.create(
            format!("set {set}"),
            NfTablesMessage::NewSet(SetMessage { attributes }),
        )
    }

    fn create_chain(&self) -> Request {
        let attributes = vec![
            ChainAttribute::Table(self.name.clone()),
            ChainAttribute::Name(CHAIN.to_owned()),
            ChainAttribute::Hook(vec![
                Hook::Number(HookNumber::Inet(InetHookNumber::PostRouting)),
                Hook::Priority(PRIORITY as u32),
            ]),
            ChainAttribute::Policy(ACCEPT),
            ChainAttribute::Type("nat".to_owned()),
        ];
        let message = NfTablesMessage::NewChain(ChainMessage { attributes });
        self.create(format!("chain {CHAIN}"), message)
    }

    fn create_rule(&self, family: &Family) -> Request {
        let (multicast, mask) = family.multicast;
        let expressions = [
            load_protocol(),
            compare(Operator::Equal, &[family.protocol]),
            load_address(family.source, family.length),
            look_up(family.pods, 0),
            load_address(family.destination, family.length),
            look_up(family.local, NOT_IN_SET),
            load_address(family.destination, multicast.len() as u32),
            apply_mask(mask),
            compare(Operator::NotEqual, multicast),
            masquerade(),
        ];
        // nft(8) leaves out a mask that changes nothing, and expects that when it shows the rule.
        let masks = mask.iter().any(|byte| *byte != 0xff);
        let expressions = expressions
            .into_iter()
            .filter(|expression| masks || !matches!(expression, Expressions::Bitwise(_)))
            .map(ListAttribute::from)
            .collect();
        let mut attributes = self.of_chain();
        attributes.push(RuleAttribute::Expressions(expressions));
        let message = NfTablesMessage::NewRule(RuleMessage { attributes });
        // NLM_F_CREATE alone would put it first, without changing what it does.
        let what = format!("the masquerading rule for {}", family.pods);
        self.create(what, message)
            .with_flags(netlink_packet_core::NLM_F_APPEND)
    }

    /// Adds an address to its set; EEXIST when it is there.
    pub(super) fn add_pod(&self, address: IpAddr, owner: &str) -> Request {
        self.create_pod(address, owner, Some(owner))
            .with_flags(netlink_packet_core::NLM_F_EXCL)
    }

    /// Adds an address to its set, whether it is there or not, with this owner.
    pub(super) fn replace_pod(&self, address: IpAddr, owner: &str) -> [Request; 3] {
        // The first makes sure that there is one to delete, the second that the last is new: an
        // element that is there would keep its comment.
        [
            self.create_pod(address, owner, None),
            self.delete_pod(address),
            self.create_pod(address, owner, Some(owner)),
        ]
    }

    fn create_pod(&self, address: IpAddr, owner: &str, comment: Option<&str>) -> Request {
        let message = self.elements(Family::of(address).pods, vec![pod(address, comment)]);
        self.create(
            format!("{address} for {owner}"),
            NfTablesMessage::NewSetElement(message),
        )
    }

    /// Removes an address; ENOENT when it is not there.
    pub(super) fn delete_pod(&self, address: IpAddr) -> Request {
        let message = self.elements(Family::of(address).pods, vec![pod(address, None)]);
        self.request(
            format!("remove {address}"),
            0,
            NfTablesMessage::DeleteSetElement(message),
        )
    }

    /// Adds a range; EEXIST when another one overlaps it, fine when the same is there.
    pub(super) fn add_range(&self, range: IpNet) -> Request {
        let message = self.elements(Family::of(range.addr()).local, interval(range));
        self.create(
            format!("local range {range}"),
            NfTablesMessage::NewSetElement(message),
        )
    }

    /// Removes a range; ENOENT when it is not there.
    pub(super) fn delete_range(&self, range: IpNet) -> Request {
        let message = self.elements(Family::of(range.addr()).local, interval(range));
        let what = format!("remove local range {range}");
        self.request(what, 0, NfTablesMessage::DeleteSetElement(message))
    }

    /// Deletes the table with everything in it; ENOENT when it is not there.
    pub(super) fn delete_table(&self) -> Request {
        let attributes = vec![TableAttribute::Name(self.name.clone())];
        let message = NfTablesMessage::DeleteTable(TableMessage { attributes });
        self.request("delete the table".to_owned(), 0, message)
    }

    /// Asks for the table.
    pub(super) fn get_table(&self) -> Request {
        let attributes = vec![TableAttribute::Name(self.name.clone())];
        let message = NfTablesMessage::GetTable(TableMessage { attributes });
        Request::new(format!("look up {}", self.table()), &inet(message))
    }

    /// Asks for the elements of a set; to be dumped.
    pub(super) fn list_elements(&self, set: &str) -> Request {
        let message = NfTablesMessage::GetSetElement(self.elements(set, vec![]));
        Request::new(
            format!("list set {set} of {}", self.table()),
            &inet(message),
        )
    }

    /// Asks for the rules of the chain; to be dumped.
    pub(super) fn list_rules(&self) -> Request {
        let attributes = self.of_chain();
        let message = NfTablesMessage::GetRule(RuleMessage { attributes });
        Request::new(format!("list rules of {}", self.table()), &inet(message))
    }

    /// Asks for the generation of the whole ruleset.
    pub(super) fn get_generation(&self) -> Request {
        let message = NfTablesMessage::GetGen(GenMessage { attributes: vec![] });
        Request::new(
            "read the generation of the nftables ruleset",
            &inet(message),
        )
    }

    fn of_chain(&self) -> Vec<RuleAttribute> {
        vec![
            RuleAttribute::Table(self.name.clone()),
            RuleAttribute::Chain(CHAIN.to_owned()),
        ]
    }

    fn elements(&self, set: &str, elements: Vec<Vec<SetElementAttribute>>) -> SetElementMessage {
        let mut attributes = vec![
            SetElementList::Table(self.name.clone()),
            SetElementList::Set(set.to_owned()),
        ];
        if !elements.is_empty() {
            let elements = elements.into_iter().map(ListAttribute::Element).collect();
            attributes.push(SetElementList::Elements(elements));
        }
        SetElementMessage { attributes }
    }

    fn create(&self, what: String, message: NfTablesMessage) -> Request {
        self.request(format!("add {what}"), NLM_F_CREATE, message)
    }

    fn request(&self, what: String, flags: u16, message: NfTablesMessage) -> Request {
        Request::change(format!("{}: {what}", self.table()), flags, &inet(message))
    }
}

fn inet(message: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
        message,
    )
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn key(address: IpAddr) -> SetElementAttribute {
    SetElementAttribute::Key(DataAttribute::Value(octets(address)))
}

fn pod(address: IpAddr, comment: Option<&str>) -> Vec<SetElementAttribute> {
    let comment =
        comment.map(|text| SetElementAttribute::UserData(read::comment_to_user_data(text)));
    [key(address)].into_iter().chain(comment).collect()
}

/// An interval is its first address and, as an element that ends it, the one after its last.
fn interval(range: IpNet) -> Vec<Vec<SetElementAttribute>> {
    let end = ranges::next(range.broadcast()).map(|after| {
        vec![
            key(after),
            SetElementAttribute::Flags(SetElementFlags::IntervalEnd),
        ]
    });
    [vec![key(range.network())]]
        .into_iter()
        .chain(end)
        .collect()
}

fn load_protocol() -> Expressions {
    Expressions::Meta(vec![
        Meta::DestinationRegister(Register::Reg1),
        Meta::Key(MetaKey::Nfproto),
    ])
}

fn load_address(offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(NETWORK_HEADER),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn look_up(set: &str, flags: u32) -> Expressions {
    Expressions::Lookup(vec![
        Lookup::Set(set.to_owned()),
        Lookup::SourceRegister(Register::Reg1),
        Lookup::Flags(flags),
    ])
}

fn apply_mask(mask: &[u8]) -> Expressions {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(mask.len() as u32),
        Bitwise::Mask(DataAttribute::Value(mask.to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
    ])
}

fn compare(operator: Operator, with: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(with.to_vec())),
    ])
}

fn masquerade() -> Expressions {
    Expressions::Other {
        expression_type: "masq".to_owned(),
        attributes: vec![],
    }
}
