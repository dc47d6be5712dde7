//! A synchronous netlink socket: requests in batches, dumps that are retried when
//! they were interrupted, and the kernel's extended acknowledgements as error text.
//! [`crate::link`] builds the route family on it, [`crate::napi`] the netdev one, [`crate::nft`] nf_tables.
