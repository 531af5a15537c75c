"""The input graph of a language model: pure TensorFlow ops that read the shard files.

Elements are (inputs [b, T], labels [b, T]), int32, and where not every label is a target their weight [b, T], float32.
"""

import dataclasses

import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.config import Config, batch_sizes
from tfdist.data import samples, service, sharding
from tfdist.data.order import BlockOrder, Mixture, Order
from tfdist.data.samples import Samples
from tfdist.data.shards import Split, TokenDataset
from tfdist.errors import DataError
from tfdist.strategies.base import DatasetFn, InputContext

_BLOCK_BYTES = 1 << 20
_GROUPS_IN_MEMORY = 4  # one that is read from, one that waits, one on its way, and what reading needs besides
_CHUNK = 256  # samples that are taken from a group at once
_plain = tf.autograph.experimental.do_not_convert  # nothing to convert, and looking for it takes seconds


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps with one global batch size; of a run without `train.batch_ramp` there is one."""

    step: int
    size: int
    sample: int  # samples consumed before it


def phases(config: Config) -> list[Phase]:
    found = []
    for step, size in batch_sizes(config):
        before = found[-1].sample + (step - found[-1].step) * found[-1].size if found else 0
        found.append(Phase(step, size, before))
    return found


def train_dataset_fn(dataset: TokenDataset, config: Config, phase: int = 0, with_places: bool = False) -> DatasetFn:
    """An endless dataset in the order of the seed, O(1) to start at any step.

    `phase`: of `train.batch_ramp`. `with_places`: elements have one more part, where in the split (of a mixture: in all
    splits one after the other) each row begins, int64 [b]; what `tfdist data audit` looks at.
    """
    _check(dataset, config, "train")
    sharding.say_what_is_given_up(config.data.sharding)
    if config.data.service:
        sharding.say_what_the_service_gives_up()

    def dataset_fn(context: InputContext) -> tf.data.Dataset:
        return Reader(dataset, config, context, phase, with_places).dataset()

    return dataset_fn


def eval_dataset_fn(dataset: TokenDataset, config: Config, split_name: str = "validation") -> DatasetFn:
    """Once through a split: joined, every token but the first is a target exactly once; padded, every one of a document
    but its first. Samples come in a fixed shuffled order, so that the first batches alone are a fair sample.
    """
    _check(dataset, config, split_name)
    split, length = dataset.splits[split_name], config.data.sequence_length
    batch_size = config.eval.batch_size or config.train.global_batch_size
    cut = Samples(split, length, config.data.packing == "padded")
    number = cut.number if cut.padded else -(-(split.tokens - 1) // length)
    order, batches = Order(number, seed=0), -(-number // batch_size)
    border = -1 if config.data.border_loss else dataset.document_start
    in_memory = _bytes([split]) <= config.data.shuffle_buffer_mb << 20

    def dataset_fn(context: InputContext) -> tf.data.Dataset:
        rows = tf.constant(context.rows(batch_size), tf.int64)

        @_plain
        def load(_):
            tokens = samples.all_tokens(split.shards) if in_memory else tf.zeros([1], samples.token_type(split.shards[0]))
            return tokens, cut.load_index()

        @_plain
        def steps(tokens, index):
            @_plain
            def batch(step):
                place = step * batch_size + rows
                start, targets = cut.place(order.sample(tf.minimum(place, number - 1)), index)
                targets = tf.where(place < number, tf.minimum(targets, split.tokens - 1 - start), 0)
                if in_memory:
                    window = _windows(tokens, start, length)
                else:
                    window = tf.map_fn(lambda first: _from_disk(split, first, length), start, tokens.dtype)
                return _element(tf.cast(window, tf.int32), targets, config.model.vocab_size, True, border)

            return context.steps(batches).map(batch, num_parallel_calls=2)

        return tf.data.Dataset.from_tensors(0).map(load).flat_map(steps)

    return dataset_fn


def _check(dataset: TokenDataset, config: Config, split_name: str) -> None:
    for _, part in dataset.parts() if split_name == "train" else [(1.0, dataset)]:
        split, length = part.splits[split_name], config.data.sequence_length
        enough = split.tokens >= 2 if split_name != "train" else split.tokens > length or config.data.packing == "padded"
        if split.tokens < 2:
            raise DataError(
                f"data: expected at least 2 tokens in the {split_name} split of {part.path}, found {split.tokens}"
            )
        if not enough:
            raise DataError(
                f"data.sequence_length: expected at most {split.tokens - 1} (the training text of {part.path} has "
                f"{split.tokens} tokens), found {length}"
            )
        if config.data.packing == "padded" and not Samples(split, length, True).number:
            raise DataError(f"data.packing=padded: expected documents in {part.path}, found none")
    if dataset.document_start < 0 and (config.data.packing == "separated" or not config.data.border_loss):
        raise DataError(
            f"data.packing or data.border_loss: expected a tokenizer whose documents have a start, found {dataset.tokenizer}"
        )


def _bytes(splits) -> int:
    return sum(split.tokens * np.dtype(split.shards[0].dtype).itemsize for split in splits if split.shards)


class Reader:
    """What one pipeline reads of a training run."""

    def __init__(
        self, dataset: TokenDataset, config: Config, context: InputContext, phase: int = 0, with_places: bool = False
    ):  # fmt: skip
        self.config, self.context, self.with_places = config, context, with_places
        self.dataset_of_run = dataset
        self.policy, self.length = config.data.sharding, config.data.sequence_length
        self.border = -1 if config.data.border_loss else dataset.document_start
        self.weighted = config.data.packing == "padded" or self.border >= 0 or self.policy != "batch"
        self.mixture = Mixture.of_weights([weight for weight, _ in dataset.parts()], config.train.seed)
        self.whole = [part.splits["train"] for _, part in dataset.parts()]
        self.places_of_shards = _places_of_shards(self.whole)
        self.cuts = [Samples(self._own_files(split), self.length, config.data.packing == "padded") for split in self.whole]
        self.phases, self.phase = phases(config), phases(config)[phase]
        self.rows = self._rows(self.phase.size)
        self._check_shares()

    def _check_shares(self) -> None:
        """What is not for every number of workers."""
        worker, workers = self.context.pipeline, self.context.pipelines
        shares = {len(InputContext(w, workers, self.context.replicas, weights=self.context.weights).rows(
            self.phase.size, self.config.train.accumulate_steps)) for w in range(workers)}  # fmt: skip
        if self.policy == "replicate" and len(shares) > 1:
            raise DataError(
                f"data.sharding=replicate: expected as many rows for each of {workers} workers, found {sorted(shares)}; use "
                "a train.global_batch_size that they divide"
            )
        empty = [i for i, cut in enumerate(self.cuts) if not cut.number]
        if empty and len(self.cuts) > 1:
            raise DataError(
                f"data.sharding=file: expected a file of each dataset of the mixture for each of {workers} workers, found "
                f"none of dataset {empty[0]} for worker {worker}; use more files, or data.sharding=batch"
            )
        if empty:
            logging.warning("data.sharding=%s: worker %d of %d has nothing to read", self.policy, worker, workers)

    def own_samples(self) -> list[int]:
        """How many samples of each dataset this pipeline reads in an epoch of its own."""
        owned = [self._load_index(cut)[1] if self.policy in ("hash", "random") else None for cut in self.cuts]
        return [cut.number if own is None else int(tf.size(own)) for cut, own in zip(self.cuts, owned, strict=True)]

    def _own_files(self, split: Split) -> Split:
        if self.policy != "file":
            return split
        owners = sharding.owner_of_files(len(split.shards), self.context.pipelines)
        own = [shard for shard, owner in zip(split.shards, owners, strict=True) if owner == self.context.pipeline]
        return dataclasses.replace(split, shards=tuple(own), tokens=sum(s.tokens for s in own))

    def _rows(self, size: int) -> np.ndarray:
        return self.context.rows(size, self.config.train.accumulate_steps)

    def positions(self, step: tf.Tensor) -> tf.Tensor:
        """Which samples of the run this pipeline takes at a step; all but `batch` count their own samples only."""
        phase = self.phase
        if self.policy == "batch":
            return phase.sample + (step - phase.step) * phase.size + tf.constant(self.rows, tf.int64)
        return self._consumed() + (step - phase.step) * len(self.rows) + tf.range(len(self.rows), dtype=tf.int64)

    def _consumed(self) -> int:
        """Own samples before this phase."""
        earlier = [p for p in self.phases if p.step <= self.phase.step]
        pairs = zip(earlier[:-1], earlier[1:], strict=True)
        return sum((after.step - before.step) * len(self._rows(before.size)) for before, after in pairs)

    def dataset(self) -> tf.data.Dataset:
        if not len(self.rows) or not any(cut.number for cut in self.cuts):
            return self._nothing()
        if self.config.data.service:
            return self._from_service()
        if _bytes(self.whole) <= self.config.data.shuffle_buffer_mb << 20:
            return self._from_memory()
        return self._in_blocks()

    def _nothing(self) -> tf.data.Dataset:
        """A worker without files, or without rows: it takes part with weight 0."""
        shape = [len(self.rows), self.length + 1]
        empty = self._element(
            tf.zeros(shape, tf.int32), tf.zeros(shape[:1], tf.int64), tf.fill(shape[:1], tf.constant(-1, tf.int64))
        )
        return tf.data.Dataset.from_tensors(empty).repeat()

    def _element(self, window, targets, start):
        element = _element(window, targets, self.config.model.vocab_size, self.weighted, self.border)
        return (*element, start) if self.with_places else element

    # ---- through the data service ----

    def _from_service(self) -> tf.data.Dataset:
        """Chunks of the run's order, whose numbers the service deals out; each pipeline takes the samples that it gets."""
        consumed = self.phase.sample + (self.context.start_step - self.phase.step) * self.phase.size
        whole = self.dataset_of_run.splits["train"]

        @_plain
        def chunk(number):
            position = number * _CHUNK + tf.range(_CHUNK, dtype=tf.int64)
            start, targets = self._places(position, [((), tf.constant([-1], tf.int64)) for _ in self.cuts])
            window = tf.map_fn(
                lambda first: _from_disk(whole, first, self.length), start, samples.token_type(whole.shards[0])
            )
            return self._element(tf.cast(window, tf.int32), targets, start)

        numbers = tf.data.Dataset.range(consumed // _CHUNK, np.iinfo(np.int64).max)
        chunks = service.through(numbers.map(chunk, num_parallel_calls=2), f"train-{consumed}")
        return chunks.unbatch().batch(len(self.rows), drop_remainder=True)

    # ---- from memory ----

    def _from_memory(self) -> tf.data.Dataset:
        @_plain
        def load(_):
            tokens = samples.all_tokens([shard for cut in self.cuts for shard in cut.split.shards])
            return tokens, tuple(self._load_index(cut) for cut in self.cuts)

        @_plain
        def steps(tokens, indices):
            @_plain
            def batch(step):
                start, targets = self._places(self.positions(step), indices)
                window = tf.cast(_windows(tokens, start, self.length), tf.int32)
                return self._element(window, targets, self._in_whole(start))

            return self.context.steps().map(batch, num_parallel_calls=2, deterministic=True)

        return tf.data.Dataset.from_tensors(0).map(load).flat_map(steps)

    def _places(self, positions: tf.Tensor, indices) -> tuple[tf.Tensor, tf.Tensor]:
        """Positions in the order -> (first token in this worker's files, number of targets)."""
        first_token = np.cumsum([0] + [cut.split.tokens for cut in self.cuts])
        dataset, position = self.mixture.split(positions)
        start, targets = tf.zeros_like(position), tf.zeros_like(position)
        for i, (cut, index) in enumerate(zip(self.cuts, indices, strict=True)):
            place, number = self._place(cut, position, *index)
            start = tf.where(dataset == i, place + first_token[i], start)
            targets = tf.where(dataset == i, number, targets)
        return start, targets

    def _load_index(self, cut: Samples) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        """(what `place` needs, this worker's samples; one -1: all)."""
        index, everything = cut.load_index(), tf.constant([-1], tf.int64)
        workers, worker = self.context.pipelines, self.context.pipeline
        if self.policy == "hash":
            start, _ = cut.place(tf.range(cut.number, dtype=tf.int64), index)
            starts, keys = samples.documents(cut.split)
            document = tf.maximum(tf.searchsorted(starts, start, side="right") - 1, 0)
            owner = sharding.owner_by_hash(tf.gather(keys, document), workers)
        elif self.policy == "random":
            owner = sharding.owner_at_random(cut.number, workers, self.config.train.seed)
        else:
            return index, everything
        return index, tf.reshape(tf.where(owner == worker), [-1])

    def _place(self, cut: Samples, position, index, own) -> tuple[tf.Tensor, tf.Tensor]:
        seed, shuffle = self.config.train.seed, self.config.data.shuffle
        if self.policy not in ("hash", "random"):
            return cut.place(Order(cut.number, seed, shuffle).sample(position), index)
        number = tf.size(own, tf.int64)
        sample = Order(tf.maximum(number, 1), seed, shuffle).sample(position)
        padded = tf.concat([own, tf.zeros([1], tf.int64)], 0)
        start, targets = cut.place(tf.gather(padded, sample), index)
        return start, tf.where(number > 0, targets, 0)

    def _in_whole(self, start: tf.Tensor) -> tf.Tensor:
        """A token's place among this worker's files -> its place in the corpus."""
        own = [shard for cut in self.cuts for shard in cut.split.shards]
        ends = tf.constant(np.cumsum([shard.tokens for shard in own]), tf.int64)
        moved = [self.places_of_shards[shard.path] for shard in own] - (ends - [shard.tokens for shard in own])
        return start + tf.gather(moved, tf.searchsorted(ends, start, side="right"))

    # ---- from disk ----

    def _in_blocks(self) -> tf.data.Dataset:
        if self.policy in ("hash", "random"):
            raise DataError(
                f"data.sharding={self.policy}: expected a corpus of at most data.shuffle_buffer_mb="
                f"{self.config.data.shuffle_buffer_mb}, found {_bytes(self.whole) >> 20} MB; use batch or file, or raise it"
            )
        size, rows, phase = len(self.rows), self.rows, self.phase
        if self.policy == "batch":  # this worker's rows of all: a mixture picks before it leaves out
            first = phase.sample + (self.context.start_step - phase.step) * phase.size
            period, wanted = phase.size, np.isin(np.arange(phase.size), rows)
        else:
            first = self._consumed() + (self.context.start_step - phase.step) * size
            period, wanted = 1, np.array([True])

        @_plain
        def is_mine(position):
            return tf.gather(tf.constant(wanted), (position - phase.sample) % period)

        if len(self.cuts) == 1:
            stream = self._stream(self.cuts[0], 0, tf.constant(first, tf.int64), is_mine)
        else:
            before = self.mixture.before(tf.constant(first, tf.int64))
            everything = [
                self._stream(cut, i, before[i], lambda position: tf.ones_like(position, tf.bool))
                for i, cut in enumerate(self.cuts)
            ]
            positions = tf.data.Dataset.range(first, np.iinfo(np.int64).max)
            which = positions.batch(_CHUNK).map(_plain(lambda position: self.mixture.split(position)[0])).unbatch()
            chosen = tf.data.Dataset.choose_from_datasets(everything, which, stop_on_empty_dataset=False)
            stream = tf.data.Dataset.zip(positions, chosen).filter(_plain(lambda position, _: is_mine(position)))
            stream = stream.map(_plain(lambda _, element: element))
        batches = stream.batch(size, drop_remainder=True)
        return batches.map(_plain(self._element), num_parallel_calls=2, deterministic=True)

    def _stream(self, cut: Samples, number: int, first: tf.Tensor, is_mine) -> tf.data.Dataset:
        """This worker's samples of one dataset from position `first` of its order on, one by one:
        (window [T + 1] int32, targets, first token in the whole)."""
        config, length, tokens = self.config, self.length, cut.split.tokens
        item_bytes = np.dtype(cut.split.shards[0].dtype).itemsize
        group_bytes = (config.data.shuffle_buffer_mb << 20) // (_GROUPS_IN_MEMORY * len(self.cuts))
        block = max(1, min(_BLOCK_BYTES, group_bytes // 16) // (cut.block_tokens_of * item_bytes))
        block_tokens = block * cut.block_tokens_of + 1
        group = max(1, group_bytes // (block_tokens * item_bytes))
        order = BlockOrder(cut.number, config.train.seed, block, group, config.data.shuffle)
        before = sum(c.split.tokens for c in self.cuts[:number])

        @_plain
        def groups(*index):
            @_plain
            def load(which):  # one group: its blocks side by side, each in a place of the same size
                epoch, group_number = which // order.groups, which % order.groups
                samples_before = group_number * block * group
                size = tf.minimum(tf.constant(block * group, tf.int64), cut.number - samples_before)
                slots = tf.range(-(-size // block), dtype=tf.int64)
                first_samples = order.block_at(epoch, group_number * group + slots) * block
                starts, _ = cut.place(first_samples, index)
                last, _ = cut.place(tf.minimum(first_samples + block, cut.number) - 1, index)
                ends = tf.minimum(last + length + 1, tokens)
                blocks = tf.data.Dataset.from_tensor_slices((starts, ends)).map(
                    _plain(lambda start, end: _filled_up(samples.token_range(cut.split, start, end), block_tokens)),
                    num_parallel_calls=4, deterministic=True,
                )  # fmt: skip
                content = tf.reshape(blocks.batch(group).get_single_element(), [-1])
                position = epoch * cut.number + samples_before + tf.range(size)
                position = tf.boolean_mask(position, (position >= first) & is_mine(position))
                *_, slot, offset = order.place(position)
                start, targets = cut.place(tf.gather(first_samples, slot) + offset, index)
                return content, start - tf.gather(starts, slot) + slot * block_tokens, targets, start + before

            @_plain
            def unpack(content, local, targets, start):
                @_plain
                def window(local, targets, start):
                    return tf.cast(_windows(content, local, length), tf.int32), targets, self._in_whole(start)

                chunks = tf.data.Dataset.from_tensor_slices((local, targets, start)).batch(_CHUNK)
                return chunks.map(window, num_parallel_calls=2, deterministic=True)

            epoch = first // cut.number
            first_group = epoch * order.groups + (first % cut.number) // (block * group)
            counted = tf.data.Dataset.range(first_group, np.iinfo(np.int64).max)
            return counted.map(load).prefetch(1).flat_map(unpack).unbatch()

        if not cut.padded:
            return groups()
        return tf.data.Dataset.from_tensors(0).map(_plain(lambda _: cut.load_index())).flat_map(groups)


def _places_of_shards(splits) -> dict:
    """Where each shard's first token is when all splits stand one after the other."""
    places, before = {}, 0
    for split in splits:
        for shard in split.shards:
            places[shard.path] = before
            before += shard.tokens
    return places


def _filled_up(tokens: tf.Tensor, size: int) -> tf.Tensor:
    return tf.ensure_shape(tf.pad(tokens, [[0, size - tf.size(tokens)]]), [size])


def _windows(tokens: tf.Tensor, start: tf.Tensor, length: int) -> tf.Tensor:
    """[n, T + 1] tokens that begin at `start` [n]; beyond the end the last token is repeated."""
    place = start[:, None] + tf.range(length + 1, dtype=tf.int64)
    return tf.gather(tokens, tf.minimum(place, tf.size(tokens, tf.int64) - 1))


def _from_disk(split: Split, start: tf.Tensor, length: int) -> tf.Tensor:
    """The same for one sample, [T + 1]."""
    found = samples.token_range(split, start, tf.minimum(start + length + 1, split.tokens))
    return tf.ensure_shape(tf.concat([found, tf.fill([length + 1 - tf.size(found)], found[-1])], 0), [length + 1])


def _element(window: tf.Tensor, targets: tf.Tensor, vocab_size: int, weighted: bool, border: int):
    """Windows [n, T + 1] -> (inputs, labels[, weight]) [n, T]. `border`: the token that is no target; -1: all are."""
    in_range = tf.debugging.assert_less(
        tf.reduce_max(window), vocab_size, message=f"data: a token id is not below model.vocab_size={vocab_size}"
    )
    with tf.control_dependencies([in_range]):  # under XLA an embedding would silently clamp it
        window = tf.identity(window)
    inputs, labels = window[:, :-1], window[:, 1:]
    if not weighted:
        return inputs, labels
    real = tf.range(labels.shape[1], dtype=tf.int64) < targets[:, None]
    return inputs, labels, tf.cast(real & (labels != border), tf.float32)
