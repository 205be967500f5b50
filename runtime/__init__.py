"""What a run needs around the method: whoever reads the method can skip it, except for the flags.

    flags.py          the trainer's flags and their defaults; how flags are read
    startup.py        joining processes; reading and checking all input; what will happen, and the self-check
    rows.py           rows of data: how they are read, and which are refused or dropped
    templates.py      a model's tokenizer and chat template
    architectures.py  what models differ in, and our attention in transformers' interface
    weights.py        model folders into shards, and back
    hub_kernels.py    that transformers does not take our kernels.py for a package of Hugging Face
    offload.py        AdamW's tensors in host memory
    gathering.py      micro-batches without copies, where memory allows
    planning.py       what a run holds in memory, by arithmetic; bench/plan.py prints it
    live_bytes.py     the bytes of tensors that live at the same time, counted
    checkpoints.py    complete or absent, for any number of processes
    outputs.py        the output folder of a run; the cache of reference log-probabilities
    commands.py       signals, torchrun's environment, how a command ends
    files.py          files that are there completely or not at all
    messages.py       lines of rank 0, progress bars, errors in one line
"""
