"""tools/bench: nbdthin and the servers one would otherwise use, the same work on each, in turn.

    __main__    the command line and its exit status: read me first
    works       the table of what is measured, against whom, and how far ahead nbdthin shall be
    servers     what a server is here: states of images, settings, what all stand on
    peers       the servers nbdthin is measured beside, their best settings and why
    ours        nbdthin as one of them
    rounds      the measuring: prepare, then all servers in each round, then verify
    standings   what the rounds say: ratios, how sure they are, and whom to measure further
    trials      what depends on the mapping's size: nbdthin against its own limits
    bigpool     a pool with millions of mapped blocks and no data
    upkeep      the daemon with checkpoints or merges all the time
    load        one process that opens a pool
    latency     reads, each timed
    slowdisk    a sync that takes longer
    fio         one run of fio, its report as numbers
    cold        images out of the page cache
    tree        a root file system through nbdcopy, and through tar on a mounted export
    ranges      TRIM and BLOCK_STATUS of whole volumes
    images      what blocks hold, so that every byte can be checked afterwards
    client      a small NBD client to fill and to read back (not nbdthin's own code, which is what is tested)
    process     servers as processes: start, CPU time, end
    report      the tables and the JSON
    profile     where a server's time goes, by perf
    charts      two pictures of them
    options     what their command lines have in common
    machine     what ran: processor, kernel, versions, missing programs

All figures are of a warm page cache, but for the work that says otherwise. They mean little without the others of the
same run: machines differ, and one machine differs from hour to hour. Compare ratios.
"""
