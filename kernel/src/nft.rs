//! Masquerading through nf_tables, spoken over netlink: one table, one chain and one set a family for all pods.
//! (owner of this file: fills in what the netplugin needs: ensure table `inet kbp`, postrouting nat chain, add/remove pod elements, list them, delete table)
