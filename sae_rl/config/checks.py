"""What no single field of a configuration can know: arithmetic and contradictions between fields."""

from __future__ import annotations

from typing import Literal

from sae_rl.config.schema import Config
from sae_rl.data.sources import problems_of_task

LearnerRole = Literal["policy", "critic"]


def check(config: Config) -> list[str]:
    """What is wrong between fields with a run, each with the keys to change; empty when nothing is."""
    return [
        *problems_of_task(config.task),
        *_check_sources(config),
        *_check_batches(config),
        *_check_sampling(config),
        *_check_engines(config),
        *_check_learners(config),
        *_check_dynamic_sampling(config),
        *_check_schedule(config),
        *_check_partial_rollouts(config),
        *_check_colocation(config),
        *_check_context(config, _learner_roles(config)),
    ]


def check_evaluation(config: Config) -> list[str]:
    """The same of an evaluation, which has no learners."""
    problems = [*problems_of_task(config.task), *_check_engines(config), *_check_context(config, [])]
    if config.task.evaluation is None:
        problems.append("task.evaluation = null: it says what is evaluated")
    return problems


def _check_sources(config: Config) -> list[str]:
    problems = []
    if config.task.train is None:
        problems.append("task.train = null: a run needs prompts to train on")
    if config.task.evaluation is None and config.evaluation.every_steps:
        problems.append(
            f"task.evaluation = null, but evaluation.every_steps = {config.evaluation.every_steps}: set it to 0, or say what "
            "is evaluated"
        )
    return problems


def _check_context(config: Config, learners: list[LearnerRole]) -> list[str]:
    """Whether prompts and responses fit into the model, and into the passes of those who learn from them."""
    try:
        context = config.model.read_context_tokens()
    except ValueError as error:
        return [str(error)]
    problems = []
    wanted = config.task.max_prompt_tokens + config.rollout.max_response_tokens
    if wanted > context:
        problems.append(
            f"task.max_prompt_tokens ({config.task.max_prompt_tokens}) + rollout.max_response_tokens "
            f"({config.rollout.max_response_tokens}) = {wanted} tokens, but the model at {config.model.path} takes "
            f"{context}; shorten one of them"
        )
    sharing = config.learner.sequence_parallel_size
    for role in learners:
        budget = getattr(config.learner, role).micro_batch_tokens
        if budget * sharing < wanted:
            shared = f" x learner.sequence_parallel_size ({sharing})" if sharing > 1 else ""
            problems.append(
                f"learner.{role}.micro_batch_tokens ({budget}){shared} is below one full prompt + response ({wanted} tokens)"
            )
    return problems


def _learner_roles(config: Config) -> list[LearnerRole]:
    return ["policy", "critic"] if config.algorithm.needs_critic else ["policy"]


def _check_batches(config: Config) -> list[str]:
    problems = []
    total = config.responses_per_step
    size = f"rollout.prompts_per_step x rollout.group_size = {total} responses"
    for role in _learner_roles(config):
        updates = getattr(config.learner, role).num_mini_batches
        ranks = getattr(config.cluster, role).num_workers // config.learner.sequence_parallel_size
        if total % updates:
            problems.append(f"{size} cannot be divided by learner.{role}.num_mini_batches = {updates}")
        elif ranks and (total // updates) % ranks:
            problems.append(
                f"a mini-batch of {total // updates} responses ({size} / learner.{role}.num_mini_batches = {updates}) "
                f"cannot be divided by cluster.{role}.num_workers = {ranks}"
                + (" (over learner.sequence_parallel_size)" if config.learner.sequence_parallel_size > 1 else "")
            )
    if config.algorithm.needs_critic and config.learner.critic_pretraining.num_prompts == 1:
        problems.append("learner.critic_pretraining.num_prompts = 1: some are held out, so use 0 or at least 2")
    if not config.algorithm.needs_critic and config.algorithm.bootstrap_truncated:
        problems.append(
            "algorithm.bootstrap_truncated = true, but a critic-free estimator has no values: set it to false"
        )
    if not config.algorithm.needs_critic and config.rollout.group_size < 2:
        problems.append(
            "rollout.group_size is 1, but a critic-free estimator compares responses of a group: at least 2"
        )
    return problems


def _check_sampling(config: Config) -> list[str]:
    """Whatever changes the distribution changes the logprobs that vLLM reports: ratio and segments would be biased."""
    sampling = config.rollout.sampling(config.rollout.max_response_tokens)
    penalty = "the policy does not know of a penalty, which changes the logprobs"
    truncated = "a truncated distribution renormalises the logprobs"
    return [
        f"rollout.{key} = {found}: training needs {key} = {neutral}, because "
        f"{penalty if key.endswith('penalty') else truncated} that the ratio and the segments read (evaluation may use it: "
        f"evaluation.{key})"
        for key, found, neutral in sampling.changes()
    ]


def _check_dynamic_sampling(config: Config) -> list[str]:
    wanted = config.rollout.dynamic_sampling
    if wanted.mode == "none":
        return []
    problems = []
    if wanted.by == "variance" and config.rollout.group_size < 2:
        problems.append(
            "rollout.dynamic_sampling.by = variance, but with rollout.group_size = 1 no group's rewards differ: use "
            "success_rate, or a larger group"
        )
    if wanted.by == "success_rate" and wanted.success_low > wanted.success_high:
        problems.append(
            f"rollout.dynamic_sampling.success_low = {wanted.success_low:g} is above success_high = {wanted.success_high:g}"
        )
    return problems


def _check_schedule(config: Config) -> list[str]:
    schedule, problems = config.schedule, []
    if (schedule.mode == "overlapped") != (schedule.max_staleness > 0):
        allowed = "at least 1" if schedule.mode == "overlapped" else "0"
        problems.append(
            f"schedule.max_staleness = {schedule.max_staleness}: with schedule.mode = {schedule.mode} it is {allowed}"
        )
    if schedule.mode == "synchronous" and schedule.weight_updates == "in_flight":
        problems.append(
            "schedule.weight_updates = in_flight: with schedule.mode = synchronous no response is under way when weights are "
            "sent; use drained, or schedule=overlapped"
        )
    if config.replay is not None and config.replay.resolve() == config.output_dir.resolve():
        problems.append(f"replay = output_dir = {config.replay}: a run records anew; choose another output_dir")
    if config.replay is not None and schedule.mode == "overlapped":
        problems.append(
            "replay and schedule.mode = overlapped: recorded rollouts need no sampling; use schedule=synchronous"
        )
    return problems


def _check_colocation(config: Config) -> list[str]:
    """CUDA IPC needs a policy rank on each engine's GPU; engines that sleep cannot sample while others learn."""
    if not config.cluster.colocate_rollout:
        return []
    needed: dict[str, tuple[object, object]] = {
        "cluster.device": (config.cluster.device, "cuda"),
        "cluster.share_learner_gpus": (config.cluster.share_learner_gpus, True),
        "rollout.tensor_parallel_size": (config.rollout.tensor_parallel_size, 1),
        "cluster.rollout.num_workers": (config.cluster.rollout.num_workers, config.cluster.policy.num_workers),
        # A replacement could not measure what is free on a GPU where learners work.
        "rollout.max_engine_losses": (config.rollout.max_engine_losses, 0),
        "schedule.mode": (config.schedule.mode, "synchronous"),
    }
    return [
        f"cluster.colocate_rollout = true needs {key} = {allowed}, found {found}"
        for key, (found, allowed) in needed.items()
        if found != allowed
    ]


def _check_partial_rollouts(config: Config) -> list[str]:
    under_way, wanted = config.rollout.prompts_under_way, config.rollout.prompts_per_step
    if under_way is None:
        return []
    problems = []
    if not wanted < under_way <= 2 * wanted:
        problems.append(
            f"rollout.prompts_under_way = {under_way}: more than rollout.prompts_per_step = {wanted} and at most twice as "
            "many, or null"
        )
    if config.schedule.max_staleness < 2 or config.schedule.weight_updates != "in_flight":
        problems.append(
            "rollout.prompts_under_way leaves responses for the next step, a step older: it needs schedule=overlapped with "
            "schedule.max_staleness of at least 2 and schedule.weight_updates=in_flight"
        )
    if config.rollout.dynamic_sampling.mode != "none":
        problems.append(
            "rollout.prompts_under_way and rollout.dynamic_sampling.mode = "
            f"{config.rollout.dynamic_sampling.mode}: only one of them; set prompts_under_way to null or the mode to none"
        )
    return problems


def _check_engines(config: Config) -> list[str]:
    problems = []
    if config.cluster.rollout.num_workers < 1:
        problems.append("cluster.rollout.num_workers = 0, but at least one engine must sample")
    if config.cluster.device == "cpu" and config.rollout.tensor_parallel_size > 1:
        problems.append(
            f"rollout.tensor_parallel_size = {config.rollout.tensor_parallel_size}: on cluster.device=cpu use 1"
        )
    if config.cluster.device == "cpu" and config.rollout.kv_cache_gb is None:
        problems.append(
            "rollout.kv_cache_gb = null: on cluster.device=cpu state the size of the KV cache, for example 1"
        )
    return problems


def _check_learners(config: Config) -> list[str]:
    problems = []
    needed = {"policy": True, "critic": config.algorithm.needs_critic, "reference": config.needs_reference_workers}
    sharing = config.learner.sequence_parallel_size
    for role, is_needed in needed.items():
        count = getattr(config.cluster, role).num_workers
        if is_needed and count < 1:
            problems.append(f"cluster.{role}.num_workers = 0, but this algorithm needs at least one {role} worker")
        elif is_needed and count % sharing:
            problems.append(
                f"cluster.{role}.num_workers = {count} cannot be divided by learner.sequence_parallel_size = {sharing}"
            )
    for role in _learner_roles(config):
        learner = getattr(config.learner, role)
        for key, stage in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(learner, key) and learner.zero_stage < stage:
                problems.append(
                    f"learner.{role}.{key} = true needs learner.{role}.zero_stage of at least {stage}, found "
                    f"{learner.zero_stage}"
                )
    if config.model.logprobs == "cut_cross_entropy" and (config.cluster.device, config.model.precision) != (
        "cuda",
        "bfloat16",
    ):
        problems.append(
            "model.logprobs = cut_cross_entropy is a kernel for cluster.device=cuda and model.precision=bfloat16, found "
            f"{config.cluster.device} and {config.model.precision}: use chunked"
        )
    if sharing > 1 and config.model.attention == "eager":
        problems.append(
            f"learner.sequence_parallel_size = {sharing}: model.attention=eager cannot share rows; use sdpa or "
            "flash_attention_2"
        )
    return problems
