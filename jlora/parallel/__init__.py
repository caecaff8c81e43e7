"""Where arrays live and who computes what.

Read `sharding` first: the mesh of devices, and the table of rules that lays every array out
over it. `own_program` is what a device computes of its rows, `context` of a row that
several devices share. `described_devices` knows devices that are not there. `processes`
joins several processes, on one host or many, into one run; `launch` reads how they were
started, `lost_process` ends them when one is lost.
"""
