"""The simulated detector: frames from a specimen or a file, in any protocol, with the vendors' control interfaces.

source, specimen, simulation        where frames come from
misbehaviour, grouping              lost, doubled, late, damaged frames; how many go into a message
wire, zmq_wire, tcp_wire, sender    the way out
dcu, dcu_keys, merlin_device        what can be commanded: SIMPLON over REST, Merlin's control port
"""
