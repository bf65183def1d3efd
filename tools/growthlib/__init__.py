"""tools/growth: what grows with a pool, and what does not, each statement a curve with its bound.

    __main__    the command line and its exit status: read me first
    model       what a statement is: curves, bounds, a function that measures
    names       snapshots and clones beside ever more names
    clones      the first read on a clone, the memory of clones and of clients
    deletion    a snapshot taken out of the middle of a chain
    sequential  reading in order what was written in none
    tails       reads beside everything else that a daemon does
    served      a daemon with a pool of its own
    report      the tables and the JSON
    charts      the curves as SVG

The servers, clients and fio come from benchlib. Compare ratios: machines differ, and one machine from hour to hour.
"""
