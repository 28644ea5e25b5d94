// Sampling: what min-p, top-k and top-p keep, and the draw with Gumbel noise. What they compute is defined in
// interface.py; the noise in reference_sampling.py.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace minivllm::ISA {

namespace {

typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));

template <class To, class From>
INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The last vector of a row may be short: the rest of it is minus infinity.
INLINE Vec load_scores(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
    Vec v = broadcast(kMinusInfinity);
    std::memcpy(&v, from, size_t(count) * sizeof(float));
    return v;
}

// MurmurHash3's finaliser (Appleby 2011).
INLINE VecUint murmur_mix(VecUint bits) {
    bits ^= bits >> 16;
    bits *= 0x85EBCA6Bu;
    bits ^= bits >> 13;
    bits *= 0xC2B2AE35u;
    return bits ^ (bits >> 16);
}

// Natural logarithm of normal v > 0 within 1 ulp: the polynomial of Cephes' logf (Moshier).
INLINE Vec log(Vec v) {
    VecInt bits = bit_cast<VecInt>(v);
    VecInt power = (bits - 0x3F3504F3) >> 23;  // so that what is left is in [sqrt(1/2), sqrt(2))
    Vec f = bit_cast<Vec>(bits - (power << 23)) - 1.0f;
    Vec scale = __builtin_convertvector(power, Vec);
    Vec p = broadcast(7.0376836292e-2f);
    p = fma(p, f, broadcast(-1.1514610310e-1f));
    p = fma(p, f, broadcast(1.1676998740e-1f));
    p = fma(p, f, broadcast(-1.2420140846e-1f));
    p = fma(p, f, broadcast(1.4249322787e-1f));
    p = fma(p, f, broadcast(-1.6668057665e-1f));
    p = fma(p, f, broadcast(2.0000714765e-1f));
    p = fma(p, f, broadcast(-2.4999993993e-1f));
    p = fma(p, f, broadcast(3.3333331174e-1f));
    Vec square = f * f;
    Vec tail = p * f * square - 2.12194440e-4f * scale - 0.5f * square;
    return f + tail + 0.693359375f * scale;
}

// Uniform in (0, 1), from a hash of key and token.
INLINE Vec uniform(VecInt tokens, const int32_t* key) {
    VecUint bits = murmur_mix(bit_cast<VecUint>(tokens) + uint32_t(key[0]));
    bits = murmur_mix(bits ^ uint32_t(key[1])) & 0x7FFFFFFFu;
    Vec u = (__builtin_convertvector(bit_cast<VecInt>(bits), Vec) + 0.5f) * 0x1p-31f;
    const Vec most = broadcast(1.0f - 0x1p-24f);  // not 1, whose noise is minus infinity
    return u < most ? u : most;
}

// -log(-log(1 - u)): standard Gumbel noise.
INLINE Vec gumbel_noise(Vec u) {
    Vec rest = 1.0f - u;
    Vec lost = (rest - 1.0f) + u;  // what rounding 1 - u took away
    return -log(lost / rest - log(rest));
}

constexpr float kMostNoise = 22.2f;  // of u = 2^-32

// No less than the noise, at a tenth of its price: -log(-log(1 - u)) <= -log(u), and a float's bits, read as
// an integer, are a lower bound of its logarithm. The last summand is for rounding errors.
INLINE Vec most_noise(Vec u) {
    Vec log2_u = __builtin_convertvector(bit_cast<VecInt>(u), Vec) * 0x1p-23f - 127.0f;
    return log2_u * -0.69314718f + 1e-3f;
}

struct Best {
    float score = kMinusInfinity;
    int64_t token = 0;

    // Of equal scores the first stays; NaN never gets in.
    INLINE void add(Vec scores, int64_t first) {
        for (int i = 0; i < kLanes; ++i)
            if (scores[i] > score) score = scores[i], token = first + i;
    }
};

// Tokens whose score can't win with any noise get none, and most others lose by a bound on it.
Best best_of(const float* scores, int64_t begin, int64_t end, float temperature, const int32_t* key) {
    Best best;
    VecInt lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (int64_t first = begin; first < end; first += kLanes) {
        Vec v = load_scores(scores + first, end - first);
        if (!any(v + temperature * kMostNoise > best.score)) continue;
        if (temperature > 0.0f) {
            Vec u = uniform(lanes + int32_t(first), key);
            if (!any(v + temperature * most_noise(u) > best.score)) continue;
            v = v + temperature * gumbel_noise(u);
        }
        best.add(v, first);
    }
    return best;
}

// Floats in an interval of their order: the orders of neighbouring floats are neighbouring integers.
INLINE float of_order(int32_t order) { return as_float(uint32_t(order ^ (order >> 31 & 0x7FFFFFFF))); }

constexpr int32_t kLowestOrder = -2139095041;  // minus infinity's

struct Total {
    int64_t count = 0;
    double mass = 0.0;
};

// How far a row's tokens lie below its largest score, and how likely they are, relative to its token.
class Row {
   public:
    // What min-p drops is NaN from here on, which is above nothing.
    Row(const float* scores, int64_t vocab, float temperature, float min_p, std::vector<float>& memory)
        : size_((vocab + kLanes - 1) / kLanes * kLanes) {
        shifted_ = scratch(memory, 2 * size_);
        weights_ = shifted_ + size_;
        Vec highest = broadcast(kMinusInfinity);
        for (int64_t i = 0; i < vocab; i += kLanes) {
            Vec v = load_scores(scores + i, vocab - i);
            highest = v > highest ? v : highest;
        }
        const float top = max_lanes(highest);
        for (int64_t i = 0; i < size_; i += kLanes) {
            Vec v = load_scores(scores + i, vocab - i);
            Vec shifted = v == top ? broadcast(0.0f) : (v - top) / temperature;  // infinity - infinity is NaN
            Vec weight = exp(shifted == shifted ? shifted : broadcast(kMinusInfinity));
            store(shifted_ + i, weight >= min_p ? shifted : broadcast(std::numeric_limits<float>::quiet_NaN()));
            store(weights_ + i, weight);
        }
    }

    Total above(float edge) const {
        constexpr int64_t kRun = 64 * kLanes;  // summed in float, then in double
        Total total;
        for (int64_t run = 0; run < size_; run += kRun) {
            VecInt count = {};
            Vec mass = {};
            for (int64_t i = run; i < std::min(run + kRun, size_); i += kLanes) {
                VecInt is_above = load(shifted_ + i) >= edge;
                count -= is_above;
                mass += is_above ? load(weights_ + i) : broadcast(0.0f);
            }
            total.count += sum_lanes(count);
            total.mass += double(sum_lanes(mass));
        }
        return total;
    }

    const float* shifted() const { return shifted_; }

   private:
    int64_t size_;
    float *shifted_, *weights_;
};

// All tokens of order `high` and above are kept, and of those in [low, high) the first `num_inside`. They
// are equal, or there is only one.
struct Cut {
    int32_t low, high;
    Total at_low, at_high;
    int64_t num_inside;

    int64_t count() const { return at_low.count - at_high.count; }
    double mass() const { return at_low.mass - at_high.mass; }
};

// Halve [low, all there is) until the tokens that reach some target end inside it.
template <class IsReached>
Cut bisect(const Row& row, int32_t low, Total at_low, IsReached is_reached) {
    Cut cut{low, 1, at_low, Total{}, 0};
    while (cut.high - cut.low > 1 && cut.count() > 1) {
        int32_t middle = cut.low + (cut.high - cut.low) / 2;
        Total total = row.above(of_order(middle));
        if (is_reached(total))
            cut.low = middle, cut.at_low = total;
        else
            cut.high = middle, cut.at_high = total;
    }
    return cut;
}

// Top-k of what min-p leaves, then top-p of what top-k leaves.
Cut find_cut(const Row& row, int64_t vocab, float top_k, float top_p) {
    Total all = row.above(kMinusInfinity);
    Cut cut{kLowestOrder, kLowestOrder, all, all, vocab};
    double kept_mass = all.mass;
    if (double(all.count) > double(top_k)) {
        cut = bisect(row, kLowestOrder, all, [&](Total t) { return double(t.count) >= double(top_k); });
        cut.num_inside = int64_t(top_k) - cut.at_high.count;
        kept_mass = cut.at_high.mass + cut.mass() / double(cut.count()) * double(cut.num_inside);
    }
    if (top_p >= 1.0f) return cut;
    // Above 0, so that the likeliest token is in however small top_p is.
    const double target = std::max(double(top_p) * kept_mass, 1e-30);
    Cut top = bisect(row, cut.low, cut.at_low, [&](Total t) { return t.mass >= target; });
    double wanted = std::ceil((target - top.at_high.mass) * double(top.count()) / top.mass());
    top.num_inside = wanted < double(vocab) ? std::max(int64_t(wanted), int64_t(1)) : vocab;
    if (top.low == cut.low) top.num_inside = std::min(top.num_inside, cut.num_inside);  // both cut here
    return top;
}

void keep_row(const float* scores, int64_t vocab, float temperature, float min_p, float top_k, float top_p,
              std::vector<float>& memory, float* kept) {
    Row row(scores, vocab, temperature, min_p, memory);
    Cut cut = find_cut(row, vocab, top_k, top_p);
    const float low = of_order(cut.low), high = of_order(cut.high);
    int64_t num_left = cut.num_inside;
    for (int64_t i = 0; i < vocab; i += kLanes) {
        Vec shifted = load(row.shifted() + i);
        VecInt is_kept = shifted >= high;
        VecInt is_inside = (shifted >= low) & ~is_kept;
        if (any(is_inside))
            for (int lane = 0; lane < kLanes; ++lane)
                if (is_inside[lane] && num_left > 0) is_kept[lane] = -1, --num_left;
        Vec v = load_scores(scores + i, vocab - i);
        v = is_kept ? v : broadcast(kMinusInfinity);
        std::memcpy(kept + i, &v, size_t(std::min<int64_t>(kLanes, vocab - i)) * sizeof(float));
    }
}

}  // namespace

void draw(const float* scores, int64_t row_stride, const float* temperature, const int32_t* keys, int64_t* tokens,
          int64_t rows, int64_t vocab) {
    // Where there are few rows, threads share them: the best of a row doesn't depend on how.
    constexpr int64_t kShortest = 4096;
    const int64_t wanted = (4 * num_threads() + rows - 1) / std::max<int64_t>(rows, 1);
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, vocab / kShortest));
    const int64_t size = ((vocab + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
    std::vector<Best> best(size_t(rows * parts));
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < rows * parts; ++task) {
        const int64_t row = task / parts, begin = task % parts * size;
        best[size_t(task)] = best_of(scores + row * row_stride, begin, std::min(begin + size, vocab),
                                     temperature ? temperature[row] : 0.0f, keys ? keys + 2 * row : nullptr);
    }
    for (int64_t row = 0; row < rows; ++row) {
        Best first;
        for (int64_t part = 0; part < parts; ++part) {
            const Best& next = best[size_t(row * parts + part)];
            if (next.score > first.score) first = next;
        }
        tokens[row] = first.token;
    }
}

void keep_likely(const float* scores, int64_t row_stride, const float* temperature, const float* min_p,
                 const float* top_k, const float* top_p, float* kept, int64_t rows, int64_t vocab) {
#pragma omp parallel
    {
        std::vector<float> memory;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; ++row) {
            const float* from = scores + row * row_stride;
            const bool is_filtered = temperature[row] > 0.0f && (min_p[row] > 0.0f || top_k[row] < float(vocab) ||
                                                                 top_p[row] < 1.0f);
            if (is_filtered)
                keep_row(from, vocab, temperature[row], min_p[row], top_k[row], top_p[row], memory,
                         kept + row * vocab);
            else
                for (int64_t i = 0; i < vocab; ++i)
                    kept[row * vocab + i] = from[i] == from[i] ? from[i] : kMinusInfinity;
        }
    }
}

}  // namespace minivllm::ISA
