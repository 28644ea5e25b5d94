// Paged attention for decode, prefill and mixed batches, straight from the block tables.
//
// A tile is up to 24 rows, a row being one query token of one query head; all query heads that share a
// KV head are rows of the same tiles, so that each block is read once for all of them. A tile walks over its
// sequence's keys 64 at a time with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), and
// starts afresh every 512 keys: such a range is a partial result, and ranges are merged in order.
// Where there are fewer tiles than threads could use, the ranges of one tile are computed in parallel
// (Flash-Decoding, Dao et al. 2023) and merged afterwards.
//
// Ranges begin at multiples of 512 and a row's arithmetic involves no other row, so that a token's result is
// the same to the bit in a prefill, a chunk of one or a decode, alone or in company.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parts.h"
#include "simd.h"

namespace minivllm::ISA {

namespace {

constexpr int kTileRows = 24;  // more would wait for more keys that only the last of them see
constexpr int kTileKeys = 64;
constexpr int kSerialWork = 8;  // rows times ranges that aren't worth waking another thread
constexpr int kMostTilesAtATime = 8;  // that a thread takes, and whose first blocks it asks for beforehand
constexpr int kFewRows = 8;  // for so many, widening a block beforehand isn't worth it

// Whether widening each vector of T as it is loaded is no slower than widening a block for all rows.
template <class T>
constexpr bool kLoadsWide = std::is_same_v<T, float>;
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
constexpr bool kLoadsWide<Half> = true;
#endif

// A head's size in floats where the compiler should know it, and with it where everything lies.
template <int64_t N>
using Constant = std::integral_constant<int64_t, N>;

// The running softmax of some rows: largest score, sum of weights, weighted sum of values [rows, padded_dim].
struct Softmax {
    float *largest, *total, *values;

    void reset(int64_t rows, int64_t dim) const {
        std::fill(largest, largest + rows, kMinusInfinity);
        std::fill(total, total + rows, 0.0f);
        std::fill(values, values + rows * dim, 0.0f);
    }
};

int64_t padded(int64_t dim) { return (dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

int64_t softmax_floats(int64_t dim) { return kTileRows * (dim + 2); }

Softmax softmax_at(float* memory) { return {memory, memory + kTileRows, memory + 2 * kTileRows}; }

// One block's keys or values [16, dim] as floats [16, padded], zeros past dim.
template <class T>
void widen(const T* from, int64_t dim, int64_t padded, float* to) {
    for (int slot = 0; slot < kBlockSize; ++slot, from += dim, to += padded) {
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
        for (; d < padded; ++d) to[d] = d < dim ? to_float(from[d]) : 0.0f;
    }
}

// The blocks to ask the memory for while another is worked on: one needed soon, one needed later. Blocks lie
// anywhere in the pool, so that the CPU can't guess which are next. It has few places for lines under way and drops
// what doesn't fit: a block is asked for little by little, and twice, first into the second-level cache.
template <class T>
struct Ahead {
    const T *soon, *later;

    // `count` values of both.
    INLINE void prefetch(int64_t first, int64_t count) const {
        for (int64_t i = 0; i < count; i += 64 / sizeof(T)) {
            __builtin_prefetch(soon + first + i, 0, 3);
            __builtin_prefetch(later + first + i, 0, 1);
        }
    }
};

struct NothingAhead {
    INLINE void prefetch(int64_t, int64_t) const {}
};

// scores[row, key] = q[row] · keys[key] for N rows and one block's 16 keys. q is [rows, dim], keys
// [16, dim], scores has kTileKeys columns. (A function by itself, as weigh_rows: between others the compiler
// runs out of registers.)
template <int N, class T, class Dim, class Next>
NOINLINE void score_rows(const float* q, const T* keys, Dim dim, float* scores, Next ahead) {
    // As many sums at once as hide the latency of a multiply-add and still fit into registers.
    constexpr int kKeys = N == 1 ? 8 : N == 4 && kLanes == 8 ? 2 : 4;
    for (int first = 0; first < kBlockSize; first += kKeys) {
        ahead.prefetch(first * dim, kKeys * dim);
        Vec sums[N * kKeys] = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
            Vec x[N];
            for (int n = 0; n < N; ++n) x[n] = load(q + n * dim + d);
            for (int k = 0; k < kKeys; ++k) {
                Vec key = load(keys + (first + k) * dim + d);
                KEEP(key);
                for (int n = 0; n < N; ++n) sums[n * kKeys + k] = fma(x[n], key, sums[n * kKeys + k]);
            }
        }
        if constexpr (kKeys % 4 == 0) {
            for (int n = 0; n < N; ++n)
                for (int k = 0; k < kKeys; k += 4) sum_lanes4(sums + n * kKeys + k, scores + n * kTileKeys + first + k);
        } else {
            float totals[N * kKeys];
            for (int i = 0; i < N * kKeys; i += 4) sum_lanes4(sums + i, totals + i);
            for (int n = 0; n < N; ++n)
                for (int k = 0; k < kKeys; ++k) scores[n * kTileKeys + first + k] = totals[n * kKeys + k];
        }
    }
}

// sums[row] += weights[row] · values for N rows, `keys` of one block's values [16, dim] and the W vectors at d.
template <int N, int W, class T, class Dim, class Next>
INLINE void weigh_vectors(const float* weights, const T* values, int64_t keys, Dim dim, int64_t d, float* sums,
                          Next ahead) {
    Vec into[N][W];
    for (int n = 0; n < N; ++n)
        for (int w = 0; w < W; ++w) into[n][w] = load(sums + n * dim + d + w * kLanes);
    for (int64_t key = 0; key < keys; ++key) {
        ahead.prefetch(kBlockSize * d + key * W * kLanes, W * kLanes);
        Vec weight[N];
        for (int n = 0; n < N; ++n) weight[n] = broadcast(weights[n * kTileKeys + key]);
        for (int w = 0; w < W; ++w) {
            Vec value = load(values + key * dim + d + w * kLanes);
            KEEP(value);
            for (int n = 0; n < N; ++n) into[n][w] = fma(weight[n], value, into[n][w]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int w = 0; w < W; ++w) store(sums + n * dim + d + w * kLanes, into[n][w]);
}

// The same for all of dim, an even number of vectors.
template <int N, class T, class Dim, class Next>
NOINLINE void weigh_rows(const float* weights, const T* values, int64_t keys, Dim dim, float* sums,
                         Next ahead) {
    // As many sums as leave registers for weights.
    constexpr int kWide = kLanes == 16 ? (N == 1 ? 8 : 4) : N == 1 ? 8 : N == 2 ? 4 : N == 3 ? 3 : 2;
    int64_t d = 0;
    for (; (dim - d) % (kWide * kLanes) != 0; d += 2 * kLanes)
        weigh_vectors<N, 2>(weights, values, keys, dim, d, sums, ahead);
    for (; d < dim; d += kWide * kLanes)
        weigh_vectors<N, kWide>(weights, values, keys, dim, d, sums, ahead);
}

// run(std::integral_constant<int, N>, first row, what to ask for) for all rows: three at a time are fastest, alone
// slowest. The first ones ask for all that is ahead, unless it is null.
template <class T, class Run>
INLINE void for_rows(int64_t rows, Ahead<T> ahead, Run run) {
    int64_t row = 0;
    auto next = [&](auto n) {
        if (row == 0 && ahead.soon != nullptr) {
            run(n, row, ahead);
        } else {
            run(n, row, NothingAhead{});
        }
        row += n();
    };
    if (rows % 3 == 1 && rows > 1) next(std::integral_constant<int, 4>{});
    while (row + 3 <= rows) next(std::integral_constant<int, 3>{});
    if (rows - row == 2) next(std::integral_constant<int, 2>{});
    if (rows - row == 1) next(std::integral_constant<int, 1>{});
}

// Scores become weights e^(score - largest); what was summed up so far is rescaled where the largest grew.
// A row sees keys [hidden, visible) of the 64.
void soften_row(float* scores, int64_t hidden, int64_t visible, int64_t padded, float* largest, float* total,
                float* values) {
    if (visible <= hidden) {
        std::fill(scores, scores + kTileKeys, 0.0f);
        return;
    }
    for (int64_t key = 0; key < hidden; ++key) scores[key] = kMinusInfinity;
    for (int64_t key = visible; key < kTileKeys; ++key) scores[key] = kMinusInfinity;
    Vec top = load(scores);
    for (int i = kLanes; i < kTileKeys; i += kLanes) top = max(top, load(scores + i));
    float before = *largest, now = std::max(before, max_lanes(top));
    Vec sum = {};
    for (int i = 0; i < kTileKeys; i += kLanes) {
        Vec weight = exp(load(scores + i) - now);
        store(scores + i, weight);
        sum += weight;
    }
    if (now > before) {
        float factor = exp(before - now);
        *total *= factor;
        for (int64_t d = 0; d < padded; d += kLanes) store(values + d, load(values + d) * factor);
        *largest = now;
    }
    *total += sum_lanes(sum);
}

// scores = cap * tanh(scores / cap), for 64 keys.
void cap_row(float* scores, float cap) {
    for (int i = 0; i < kTileKeys; i += kLanes) {
        Vec power = exp(load(scores + i) * (2.0f / cap));
        store(scores + i, cap - (2.0f * cap) / (power + 1.0f));
    }
}

// A partial result into the running one.
void merge(const Softmax& from, const Softmax& to, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < rows; ++row) {
        if (from.largest[row] == kMinusInfinity) continue;  // the row sees none of these keys
        float largest = std::max(to.largest[row], from.largest[row]);
        float keep = exp(to.largest[row] - largest), add = exp(from.largest[row] - largest);
        to.largest[row] = largest;
        to.total[row] = to.total[row] * keep + from.total[row] * add;
        float *into = to.values + row * padded, *other = from.values + row * padded;
        for (int64_t d = 0; d < padded; d += kLanes) store(into + d, load(into + d) * keep + load(other + d) * add);
    }
}

// Over a KV cache of T. Dim is int64_t or a constant.
template <class T, class Dim>
class Kernel {
   public:
    Kernel(AttentionPlan& plan, const float* q, int64_t q_stride, const T* k_cache, const T* v_cache, float* out,
           int64_t out_stride, Dim padded_dim)
        : plan_(plan),
          a_(plan.batch),
          q_(q),
          q_stride_(q_stride),
          k_cache_(k_cache),
          v_cache_(v_cache),
          out_(out),
          out_stride_(out_stride),
          padded_(padded_dim) {}

    void run(Team& team) const {
        if (!plan_.items.empty()) {
            run_ranges(team);
            return;
        }
        float* memory = thread_memory();
        Softmax partial = softmax_at(memory), running = softmax_at(memory + softmax_floats(padded_));
        float* work_memory = memory + 2 * softmax_floats(padded_);
        const int64_t num_tiles = int64_t(plan_.tiles.size());
        const int64_t at_a_time = std::clamp<int64_t>(num_tiles / (16 * num_threads()), 1, kMostTilesAtATime);
        team.share(num_tiles, at_a_time, [&](int64_t i) {
            const AttentionTile& tile = plan_.tiles[i];
            const bool goes_on = i + 1 < num_tiles && (i + 1) % at_a_time != 0;
            const float* q = load_queries(tile, work_memory);
            running.reset(tile.rows, padded_);
            for (int32_t range = tile.first_range(); range < tile.end_range(); ++range) {
                const bool is_last = range + 1 == tile.end_range();
                attend(tile, range, q, work_memory, partial, is_last && goes_on ? &plan_.tiles[i + 1] : nullptr);
                merge(partial, running, tile.rows, padded_);
            }
            write(tile, running);
        });
    }

   private:
    // The same tiles, the ranges of each in parallel.
    void run_ranges(Team& team) const {
        const int64_t size = softmax_floats(padded_);
        float* memory = thread_memory();
        team.share(int64_t(plan_.items.size()), 1, [&](int64_t i) {
            const AttentionPlan::Item& item = plan_.items[i];
            const AttentionTile& tile = plan_.tiles[item.tile];
            float* work_memory = memory + 2 * size;
            const float* q = load_queries(tile, work_memory);
            attend(tile, item.range, q, work_memory, softmax_at(partial(i)), nullptr);
        });
        Softmax running = softmax_at(memory);
        team.share(int64_t(plan_.tiles.size()), 1, [&](int64_t i) {
            const AttentionTile& tile = plan_.tiles[i];
            running.reset(tile.rows, padded_);
            for (int32_t range = 0; range < tile.num_ranges(); ++range)
                merge(softmax_at(partial(plan_.first_item[i] + range)), running, tile.rows, padded_);
            write(tile, running);
        });
    }

    // The memory for an item's result.
    float* partial(int64_t item) const { return aligned(plan_.partials) + item * softmax_floats(padded_); }

    // Two softmax states, then the queries, their scores, and a block's keys or values.
    float* thread_memory() const {
        static thread_local std::vector<float> memory;
        const int64_t work = kTileRows * (padded_ + kTileKeys) + kBlockSize * padded_;
        return scratch(memory, 2 * softmax_floats(padded_) + work);
    }

    // The tile's queries, scaled: [rows, padded], zeros past head_dim.
    const float* load_queries(const AttentionTile& tile, float* to) const {
        for (int64_t row = 0; row < tile.rows; ++row) {
            const float* from = q_ + query_token(tile, row) * q_stride_ + query_head(tile, row) * a_.head_dim;
            for (int64_t d = 0; d < padded_; ++d) to[row * padded_ + d] = d < a_.head_dim ? from[d] * a_.scale : 0.0f;
        }
        return to;
    }

    // The keys that the rows of a tile see, in the cache.
    struct Keys {
        Keys(const AttentionBatch& a, const AttentionTile& tile)
            : table(a.tables + tile.sequence * a.table_stride),
              kv_heads(a.kv_heads),
              kv_head(tile.kv_head),
              block_values(kBlockSize * a.head_dim),
              begin(tile.begin),
              end(tile.end) {}

        // The block of the tile's KV head that holds a position's key or value; null past the last.
        const T* block(const T* cache, int64_t position) const {
            if (position >= end) return nullptr;
            return cache + (int64_t(table[position / kBlockSize]) * kv_heads + kv_head) * block_values;
        }

        // Where the 64s of a range begin: at multiples of 64. Of the first, blocks before `begin` are left out.
        int64_t start(int32_t range) const {
            return std::max<int64_t>(int64_t(range) * kRangeKeys, begin / kTileKeys * kTileKeys);
        }
        int64_t first_block(int64_t start) const {
            return std::max<int64_t>(0, begin - start) / kBlockSize * kBlockSize;
        }

        const int32_t* table;
        int64_t kv_heads, kv_head, block_values, begin, end;
    };

    // One range of a tile's keys, from scratch, into `result`. The tile that this thread has next is null where that
    // isn't known, or too far away to ask for its keys.
    void attend(const AttentionTile& tile, int32_t range, const float* q, float* work_memory, const Softmax& result,
                const AttentionTile* next_tile) const {
        float* scores = work_memory + kTileRows * padded_;
        // Where vectors don't divide head_dim, or where many rows share the work.
        const bool widens = a_.head_dim != padded_ || (!kLoadsWide<T> && tile.rows > kFewRows);
        float* widened = widens ? scores + kTileRows * kTileKeys : nullptr;
        const int64_t group = a_.group();
        const Keys keys(a_, tile);
        const int64_t range_end = std::min<int64_t>(keys.end, int64_t(range + 1) * kRangeKeys);
        // The key block `first` keys behind a position; where there is none, that of the next tile, from its start on.
        auto key_block_after = [&](int64_t position, int64_t first) -> const T* {
            if (position + first < keys.end || next_tile == nullptr) return keys.block(k_cache_, position + first);
            const Keys next_keys(a_, *next_tile);
            const int64_t start = next_keys.start(next_tile->first_range());
            return next_keys.block(k_cache_, start + next_keys.first_block(start) + first);
        };
        result.reset(tile.rows, padded_);
        for (int64_t start = keys.start(range); start < range_end; start += kTileKeys) {
            const int64_t num_keys = std::min<int64_t>(kTileKeys, range_end - start), after = start + kTileKeys;
            const int64_t first_block = keys.first_block(start);
            for (int64_t first = first_block; first < num_keys; first += kBlockSize) {
                const T* next = first + kBlockSize < num_keys ? keys.block(k_cache_, start + first + kBlockSize)
                                                              : keys.block(v_cache_, start + first_block);
                const Ahead<T> ahead{next, keys.block(v_cache_, start + first)};
                with_block(keys.block(k_cache_, start + first), widened, [&](auto* data) {
                    for_rows(tile.rows, ahead, [&](auto n, int64_t row, auto next) {
                        score_rows<n()>(q + row * padded_, data, padded_, scores + row * kTileKeys + first, next);
                    });
                });
            }
            for (int64_t row = 0; row < tile.rows; ++row) {
                const int64_t position = tile.first_position + (tile.row + row) / group;
                const int64_t hidden = std::clamp<int64_t>(a_.window_begin(position) - start, 0, kTileKeys);
                if (a_.softcap > 0.0f) cap_row(scores + row * kTileKeys, a_.softcap);
                soften_row(scores + row * kTileKeys, hidden, std::min<int64_t>(position + 1 - start, num_keys), padded_,
                           result.largest + row, result.total + row, result.values + row * padded_);
            }
            for (int64_t first = first_block; first < num_keys; first += kBlockSize) {
                const T* next = first + kBlockSize < num_keys ? keys.block(v_cache_, start + first + kBlockSize)
                                                              : key_block_after(after, 0);
                const T* later = key_block_after(after, first);
                const Ahead<T> ahead{next, later != nullptr ? later : next};
                const int64_t count = std::min<int64_t>(kBlockSize, num_keys - first);
                with_block(keys.block(v_cache_, start + first), widened, [&](auto* data) {
                    for_rows(tile.rows, ahead, [&](auto n, int64_t row, auto next) {
                        weigh_rows<n()>(scores + row * kTileKeys + first, data, count, padded_,
                                        result.values + row * padded_, next);
                    });
                });
            }
        }
    }

    // run(the block as it lies in the cache), or widened into memory that isn't null.
    template <class Run>
    INLINE void with_block(const T* block, float* widened, Run run) const {
        if (widened == nullptr) return run(block);
        widen(block, a_.head_dim, padded_, widened);
        run((const float*)widened);
    }

    void write(const AttentionTile& tile, const Softmax& result) const {
        for (int64_t row = 0; row < tile.rows; ++row) {
            float* to = out_ + query_token(tile, row) * out_stride_ + query_head(tile, row) * a_.head_dim;
            for (int64_t d = 0; d < a_.head_dim; ++d) to[d] = result.values[row * padded_ + d] / result.total[row];
        }
    }

    int64_t query_token(const AttentionTile& tile, int64_t row) const {
        return a_.query_start[tile.sequence] + (tile.row + row) / a_.group();
    }

    int64_t query_head(const AttentionTile& tile, int64_t row) const {
        return tile.kv_head * a_.group() + (tile.row + row) % a_.group();
    }

    AttentionPlan& plan_;
    const AttentionBatch& a_;
    const float* q_;
    int64_t q_stride_;
    const T *k_cache_, *v_cache_;
    float* out_;
    int64_t out_stride_;
    Dim padded_;
};

}  // namespace

AttentionPlan::AttentionPlan(const AttentionBatch& batch) : batch(batch) {
    const int64_t group = batch.group();
    int64_t most_ranges = 1;
    for (int32_t b = 0; b < batch.num_seqs; ++b) {
        const int64_t queries = batch.query_start[b + 1] - batch.query_start[b], rows = queries * group;
        const int64_t first_position = batch.seq_lens[b] - queries;
        for (int32_t head = 0; head < batch.kv_heads; ++head) {
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int64_t count = std::min<int64_t>(kTileRows, rows - row);
                // The first row sees the earliest keys, the last row the latest ones.
                const int64_t begin = batch.window_begin(first_position + row / group);
                const int64_t end = first_position + (row + count - 1) / group + 1;
                tiles.push_back({b, head, int32_t(row), int32_t(count), int32_t(first_position), int32_t(begin),
                                 int32_t(end)});
                most_ranges = std::max<int64_t>(most_ranges, tiles.back().num_ranges());
                work += count * tiles.back().num_ranges();
            }
        }
    }
    if (most_ranges == 1 || int64_t(tiles.size()) >= 4 * num_threads()) return;
    for (int64_t i = 0; i < int64_t(tiles.size()); ++i) {
        first_item.push_back(int64_t(items.size()));
        for (int32_t range = tiles[i].first_range(); range < tiles[i].end_range(); ++range) items.push_back({i, range});
    }
    scratch(partials, int64_t(items.size()) * softmax_floats(padded(batch.head_dim)));
}

void paged_attention(Team& team, AttentionPlan& plan, const float* q, int64_t q_stride, const void* k_cache,
                     const void* v_cache, int64_t kv_type, float* out, int64_t out_stride) {
    const int64_t dim = plan.batch.head_dim;
    auto run_for = [&](auto* k, auto* v, auto padded_dim) {
        Kernel(plan, q, q_stride, k, v, out, out_stride, padded_dim).run(team);
    };
    auto run = [&](auto* k, auto* v) {
        if (dim == 64) return run_for(k, v, Constant<64>{});
        if (dim == 128) return run_for(k, v, Constant<128>{});
        run_for(k, v, padded(dim));
    };
    if (kv_type == 0) run((const float*)k_cache, (const float*)v_cache);
    if (kv_type == 1) run((const Half*)k_cache, (const Half*)v_cache);
    if (kv_type == 2) run((const BFloat*)k_cache, (const BFloat*)v_cache);
}

void paged_attention(const float* q, int64_t q_stride, const void* k_cache, const void* v_cache,
                     int64_t kv_type, const int32_t* tables, int64_t table_stride, const int32_t* seq_lens,
                     const int32_t* query_start, int64_t num_seqs, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, float scale, int64_t window, float softcap, float* out,
                     int64_t out_stride) {
    AttentionPlan plan({tables, table_stride, seq_lens, query_start, num_seqs, heads, kv_heads, head_dim, scale,
                        window, softcap});
    run_team(plan.work > kSerialWork, [&](Team& team) {
        paged_attention(team, plan, q, q_stride, k_cache, v_cache, kv_type, out, out_stride);
    });
}

}  // namespace minivllm::ISA
