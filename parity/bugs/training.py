"""Bugs of the step and of checkpoints."""

from __future__ import annotations

from parity.bugs.record import GRADIENTS, MOMENTS, Bug

TRAINING = (
    Bug(
        name="MeanOfMeans",
        bug="averages the mean losses of micro-batches",
        effect="a token of a short part weighs more; accumulation is not one large batch",
        source="transformers#34191",
        clauses=("S3", "T1"),
        keep="training and accumulate-3 and (w2 or w3) and float32-float32",
        kills=GRADIENTS,
    ),
    Bug(
        name="GradNormPerShard",
        bug="clips each rank's shard by the shard's own norm",
        effect="ranks take steps of different lengths",
        source="pytorch#88621",
        clauses=("S5", "T2"),
        keep="training and fsdp2-w3/uneven/float32-float32/clip-0.5",
        kills=GRADIENTS,
    ),
    Bug(
        name="LateIgnored",
        bug="reduces gradients with every backward pass of a step",
        effect="accumulation costs as many reductions as it has forwards",
        source="no_sync that is not heeded",
        clauses=("T5",),
        keep="lattice and fsdp2-w2 and late and counted",
        kills=(("collectives", "step"),),
    ),
    Bug(
        name="OptimizerStateLost",
        bug="resumes with a fresh optimizer",
        effect="moments begin at zero again: the loss jumps, and the run is another one",
        source="transformers#25849",
        clauses=("T6",),
        keep="training and fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2",
        kills=MOMENTS,
    ),
    Bug(
        name="RatesLost",
        bug="resumes with the learning rate that the optimizer was made with",
        effect="the schedule begins anew, or stands still",
        source="optimizers rebuilt from options",
        clauses=("T6",),
        keep="fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2",
        kills=(("setting", "lr"),),
    ),
    Bug(
        name="GeneratorLost",
        bug="resumes without the generators' states",
        effect="dropout draws other masks than the run that was never stopped",
        source="checkpoints without generators",
        clauses=("T6",),
        keep="fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2",
        kills=(("generator", "after"),),
    ),
    Bug(
        name="OptimizerStateDtype",
        bug="holds AdamW's moments in bfloat16",
        effect="1 - b2 is below half a unit in the last place: second moments stand still",
        source="torchtitan#2732, an option there",
        clauses=("D11", "T4"),
        keep="stack/bound/torch_impl/none-w1/uneven/float32-float32/by-adamw",
        kills=MOMENTS,
    ),
    Bug(
        name="AdapterReducedNarrow",
        bug="lets the reduction's dtype reach A, B and the magnitude",
        effect="gradients are rounded to bfloat16 on their way over the ranks",
        source="FSDP mixed precision",
        clauses=("D11", "T4"),
        keep="stack/one-hot and fsdp2-w2 and reduce-bfloat16",
        kills=GRADIENTS,
    ),
)
