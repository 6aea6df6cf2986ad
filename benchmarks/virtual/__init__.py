"""`bench schedule`: the engine and its peers on one virtual clock (tests/kit/virtual).

work       a model as bytes and seconds, for peers and limits
limits     what the hardware allows
engine     the engine itself, step by step
peers      the schedules of others, by their code
rows       which models, cards, RAM, dtypes and shares are run, and what is written of each
timeline   a picture of one step
"""
