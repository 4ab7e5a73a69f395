"""Every field there is, with its default. Other configs set these and invent none."""

from ml_collections import ConfigDict
from ml_collections import config_dict

from piflow_jax import build
from piflow_jax.data import synthetic
from piflow_jax.models import dit
from piflow_jax.policy import gmm


def get_config():
  c = ConfigDict()
  c.seed = 0  # every draw of a run comes from (seed, step)
  # What is trained: a teacher by build.flow_matching; a student by build.imitation (any policy),
  # build.parallel_decoding, or build.meanflow (a rival).
  c.method = build.imitation
  c.steps = 1000  # updates in all
  c.batch_size = 128  # over all devices and microbatches
  c.microbatches = 1  # gradient accumulation: the batch is worked through in so many parts
  c.accumulator = "float32"  # what gradients of microbatches are summed in; or "bfloat16"

  c.data = ConfigDict()
  c.data.source = synthetic.source  # (split, shape, num_classes) -> random access to {"x_0", "cond"}
  c.data.shape = (32, 32, 4)  # of x_0: height, width, channels
  c.data.num_classes = 1000

  c.network = ConfigDict()
  c.network.make = dit.DiT
  c.network.depth, c.network.width, c.network.heads = 12, 768, 12
  c.network.patch = 2  # latent positions along each side of a token
  # The time that is embedded, time_offset + time_scale * noise level: scale 1 (REPA) or 1000 (FM-DiT); -1 and 1 for SiT.
  c.network.time_scale, c.network.time_offset = 1000.0, 0.0
  c.network.frequency_shift = 0  # 1 for diffusers' own DiT
  c.network.mlp_norm_eps = 1e-5  # 1e-6 in facebookresearch/DiT, SiT and REPA
  # What a block's backward pass computes again: "full", all; "none"; or all but what a policy of jax.checkpoint_policies
  # saves, e.g. "dots_with_no_batch_dims_saveable".
  c.network.remat = "full"
  c.network.attention = "auto"  # by platform; or "xla", "splash" and "flash" (TPU), "cudnn" (GPU)
  c.network.unroll = 1  # blocks in one turn of the loop over them; all of them is faster on a CPU, slower to compile
  c.network.dtype = "bfloat16"  # of the computation; parameters are float32

  c.policy = ConfigDict()  # the student's head and the policy that it makes: a head takes the fields that it knows
  c.policy.make = gmm.GMHead  # or dx.DXHead, parallel.ParallelHead
  c.policy.components = 32  # GM: K
  c.policy.logstd_width = 1024  # GM
  c.policy.dropout = 0.05  # GM: chance that a component is missing from the policy that makes the trajectory
  c.policy.points = 10  # DX: N
  c.policy.segment = 0.0  # DX: raw time over which the points lie, at any nfe; 0 is config.flow's segment
  c.policy.polynomial = False  # DX: powers of time instead of a grid
  c.policy.intervals = 128  # parallel decoding: G over the whole of raw time

  c.flow = ConfigDict()
  c.flow.nfe = 1  # network calls, i.e. segments, that the student is trained for
  c.flow.shift = 1.0  # of the noise schedule
  c.flow.dynamic_shift = False  # instead: the shift's logarithm is linear in the number of tokens
  c.flow.base_tokens, c.flow.max_tokens = 256, 4096  # (H / patch) (W / patch); the line goes on beyond both
  c.flow.base_log_shift, c.flow.max_log_shift = 0.5, 1.15  # there
  c.flow.final_scale = 1.0  # length of the last segment as a share of the others
  c.flow.total_substeps = 128  # Euler substeps of the policy over all segments

  c.imitation = ConfigDict()
  c.imitation.num_states = 2  # M, teacher queries a segment
  c.imitation.window_substeps = 0  # span over which velocities are averaged
  c.imitation.loss_scale = 3.0
  c.imitation.num_decay_steps = 0  # scheduled trajectory mixing: steps until no teacher stretch is left; 0 is none ever

  c.imitation.label = "euler"  # the teacher's velocity; or "midpoint", its mean over the window by one more call
  c.imitation.data_free = False  # walk all segments from noise instead of starting from noised data

  c.parallel_decoding = ConfigDict()  # with config.imitation's label, loss_scale and data_free
  c.parallel_decoding.min_block = 16  # intervals: blocks begin at its multiples
  c.parallel_decoding.max_block = 128  # intervals that a block's student is trained for

  c.meanflow = ConfigDict()
  c.meanflow.improved = False  # the derivative's direction is the network's own velocity
  c.meanflow.target = "data"  # or "teacher", its velocity; either starts from config.teacher.checkpoint, if any
  c.meanflow.ratio = 0.25  # share of samples whose two times differ (improved: 0.5)
  c.meanflow.logit_mean, c.meanflow.logit_std = -0.4, 1.0  # of both times
  c.meanflow.norm_power, c.meanflow.norm_eps = 1.0, 0.01  # of the adaptive weight 1 / (|error|^2 + eps)^power
  c.meanflow.label_dropout = 0.1  # target "data"
  c.meanflow.guidance_scale = 1.0  # target "data": trained into the network; the teacher has its own

  c.flow_matching = ConfigDict()
  c.flow_matching.label_dropout = 0.1  # what classifier-free guidance needs
  c.flow_matching.logit_normal = False  # draw times logit-normally rather than uniformly
  c.flow_matching.logit_mean, c.flow_matching.logit_std = 0.0, 1.0

  c.teacher = ConfigDict()
  c.teacher.checkpoint = ""  # workdir of the teacher's run
  c.teacher.mixture = config_dict.placeholder(object)  # instead: data's exact Gaussian mixture, as of data/gaussians.py
  c.teacher.weights = "ema"  # or "params"
  c.teacher.guidance_scale = 1.0  # w; no guidance for w <= 1
  c.teacher.guidance_interval = (0.0, 1.0)  # noise levels, both included, where guidance is active
  c.teacher.orthogonal = 0.0  # share of guidance's projection on the x_0 estimate that is taken out

  c.optimizer = ConfigDict()  # AdamW
  c.optimizer.learning_rate = 5e-5
  c.optimizer.warmup_steps = 400  # linear, from 0.001 of the rate
  c.optimizer.schedule = "constant"  # or "cosine", to 0 at the last step
  c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
  c.optimizer.weight_decay = 0.0
  c.optimizer.moments = "float32"  # or "bfloat16": the first ones in it; "int8": both in a byte each, block by block
  c.optimizer.clip_norm = 50.0  # global norm; active once the warm-up is over

  c.ema = ConfigDict()
  c.ema.gamma = 7.0  # beta = (1 - 1/n)^(gamma + 1)
  c.ema.start = 400  # n counts from here; before, the average is a copy

  c.mesh = ConfigDict()
  # Devices along each axis; -1 infers one of data, fsdp, tensor. Samples are split over slices, data and fsdp, parameters
  # over fsdp and (by heads and hidden units) tensor.
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.slices = -1, 1, 1, 1
  c.zero = False  # optimizer and EMA are split over data too, which no forward pass reads
  # Where parameters lie: (pattern that ends a path, axes of the mesh along its axes), of which the first that fits counts.
  c.sharding_rules = dit.SHARDING

  c.sampling = ConfigDict()  # the pictures drawn during training, and evaluation
  c.sampling.nfe = 1  # network calls: steps of a teacher, segments of a student
  # Of a build.flow_matching run alone: or "midpoint", "heun", or a solver of diffrax, e.g. "Tsit5". Evaluation has Euler
  # steps, so that its network calls are what it says.
  c.sampling.solver = "euler"
  c.sampling.temperature = 1.0  # GM: sharpens the policies of all calls but the last
  c.sampling.h = 0.0  # stochasticity: 0 deterministic, inf full re-noising
  c.sampling.images = 64  # in a picture

  c.evaluation = ConfigDict()
  c.evaluation.features = config_dict.placeholder(object)  # (images, labels) of real data -> (extract, predict) functions
  c.evaluation.samples = 2000  # of each model
  c.evaluation.batch_size = 500
  c.evaluation.seed = 0  # of the noises

  c.log_every = 50  # steps between lines of metrics
  c.eval_every = 1000  # steps between losses on held-out data; 0 is never
  c.eval_batches = 4
  c.image_every = 1000  # steps between pictures; 0 is never
  c.checkpoint_every = 1000
  c.keep_checkpoints = 2  # the latest so many
  c.keep_every = 0  # and each whose step this divides; 0 is none
  c.profile_steps = 0  # trace so many steps, from the tenth of the session on, to workdir/profile
  return c.lock()
