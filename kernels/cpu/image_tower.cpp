// A vision transformer's image tower, from pixels to tokens, in fp32 or with 8-bit products.
//
//   x          = patches * weights + positions
//   per block: x += proj(attention(qkv(norm1(x)))),   x += fc2(activation(fc1(norm2(x))))
//   attention  = softmax(q . k / sqrt(d)) * v, per head
//
// A thread takes a tile of tokens through everything between two attentions: what it reads and writes stays in its
// second-level cache, and the threads wait for each other only where all keys and values must be there: twice a block.
// Threads live as long as a call and sleep while they wait. Windows, which wait for nothing, go through all blocks so
// many at a time as make a tile; their first queries, keys and values are those of the image.
//
// What layers and attention are in each precision is said in tower_layers.h and tower_attention.h. Instruction sets
// (ZSAD_TARGET), one translation unit each: as in int8_product.cpp. Where products are 8 bits wide, all give the same
// integers.
#include "image_tower.h"

#include "buffer.h"
#include "tower_attention.h"
#include "tower_layers.h"
#include "tower_vectors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

// Threads wait here for each other, asleep.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), waiting_(0), turn_(0) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++turn_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return turn != turn_; });
  }
  // One thread at least has not come yet.
  void go_on_without(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    threads_ -= threads;
  }

 private:
  int threads_, waiting_, turn_;
  std::mutex mutex_;
  std::condition_variable all_;
};

class Forward {
 public:
  Forward(const Tower& tower, const TowerRun& run)
      : t_(tower),
        run_(run),
        tokens_(tower.front + tower.grid * tower.grid),
        head_{tokens_, tower.width / tower.heads, up(3 * tower.width, kColumns),
              kLog2E / std::sqrt(float(tower.width / tower.heads))},
        pitch_(up(tower.width, kColumns)),
        head_bytes_(bytes_of_head()),
        group_(images_at_once()),
        tile_(rows_at_once()),
        tiles_((tokens_ + tile_ - 1) / tile_),
        window_parts_(parts_of_windows()),
        stream_(group_ * tokens_ * pitch_),
        packed_(group_ * tokens_ * head_.pitch),
        heads_(group_ * tower.heads * head_bytes_),
        barrier_(run.threads),
        next_(2 * (run.depth + 1) * ((run.batch + group_ - 1) / group_)) {
    int rows = 0, length = 0;
    for (std::size_t kind = 0; kind < run.windows.size(); ++kind) {
      const Windows& w = run.windows[kind];
      rows = std::max(rows, (w.count + window_parts_[kind] - 1) / window_parts_[kind] * w.length);
      length = std::max(length, w.length);
    }
    rows = int(up(rows, kTile));
    for (int i = 0; i < run.threads; ++i)
      scratch_.push_back(std::make_unique<Scratch>(tower, std::max(tile_, rows), rows, length, run.seconds));
  }

  void run() {
    std::vector<std::thread> others;
    others.reserve(run_.threads);
    try {
      for (int i = 1; i < run_.threads; ++i) others.emplace_back([this, i] { work(*scratch_[i]); });
    } catch (const std::exception&) {  // neither threads nor memory for more, as where the address space is bounded
      barrier_.go_on_without(run_.threads - 1 - int(others.size()));
    }
    work(*scratch_[0]);
    for (std::thread& other : others) other.join();
    if (!run_.seconds) return;
    for (const auto& s : scratch_)
      for (int part = 0; part < kTowerParts; ++part)
        run_.seconds[part] += s->clock.seconds[part] / double(scratch_.size());
  }

 private:
  // Where there are many threads, so many images that each has several tiles.
  int images_at_once() const {
    const int tiles = (tokens_ + 63) / 64;
    return std::clamp((8 * run_.threads + tiles - 1) / tiles, 1, std::max(run_.batch, 1));
  }

  // A tile reads all weights of a block, whose parts in bfloat16 take time of their own; the last threads wait for the
  // others.
  double tile_cost(int rows, int tiles) const {
    return double((tiles + run_.threads - 1) / run_.threads) * (rows + (in_parts() ? 96 : 6));
  }

  int most_rows() const { return (in_parts() ? 8 : 4) * kTile; }

  bool in_parts() const { return kParts && !t_.int8; }

  int rows_at_once() const {
    int best = kTile;
    double least = 0;
    for (int rows = kTile; rows <= most_rows(); rows += kTile) {
      const double cost = tile_cost(rows, group_ * ((tokens_ + rows - 1) / rows));
      if (rows == kTile || cost < least) best = rows, least = cost;
    }
    return best;
  }

  // Of windows of each size: in how many parts an image's go through the blocks, alike for all threads.
  std::vector<int> parts_of_windows() const {
    std::vector<int> parts;
    for (const Windows& w : run_.windows) {
      int best = w.count;
      double least = 0;
      for (int number = 1; number <= w.count; ++number) {
        const int rows = int(up((w.count + number - 1) / number * w.length, kTile));
        const double cost = tile_cost(rows, group_ * number);
        if (rows <= most_rows() && (least == 0 || cost < least)) best = number, least = cost;
      }
      parts.push_back(best);
    }
    return parts;
  }

  std::size_t bytes_of_head() const {
#if defined(__AVX512VNNI__)
    if (t_.int8) return PackedHead(head_).bytes;
#endif
    return float_head_bytes(head_);
  }

  float* row(int image, int token) const { return stream_.get() + (std::size_t(image) * tokens_ + token) * pitch_; }
  float* qkv(int image, int token) const {
    return packed_.get() + (std::size_t(image) * tokens_ + token) * head_.pitch;
  }
  unsigned char* head(int image, int number) const {
    return heads_.get() + (std::size_t(image) * t_.heads + number) * head_bytes_;
  }

  // All threads: calls `work(number)` for the numbers below count, each in one thread, and waits until all are done.
  template <typename Work>
  void share(int& phase, int count, const Scratch& s, const Work& work) {
    for (int i; (i = next_[phase].fetch_add(1)) < count;) work(i);
    ++phase;
    const During during(s.clock, Part::kWaiting);
    barrier_.wait();
  }

  void work(const Scratch& s) {
    [[maybe_unused]] const Tiles tiles;
    const During during(s.clock, Part::kOther);
    int phase = 0;
    for (int first = 0; first < run_.batch; first += group_) {
      const int images = std::min(group_, run_.batch - first);
      share(phase, images * tiles_, s, [&](int i) { embed(first, i / tiles_, i % tiles_ * tile_, s); });
      if (!run_.windows.empty()) take_windows(phase, first, images, s);
      for (int block = 0; block < run_.depth; ++block) {
        share(phase, images * t_.heads, s, [&](int i) { pack(i / t_.heads, i % t_.heads, s); });
        const bool one = run_.only_first && block == run_.depth - 1;
        const int parts = one ? 1 : tiles_;
        share(phase, images * parts, s, [&](int i) {
          pass(first, block, i / parts, i % parts * tile_, one, s);
        });
      }
    }
  }

  void take_windows(int& phase, int first, int images, const Scratch& s) {
    int parts = 0;
    for (int each : window_parts_) parts += each;
    share(phase, images * parts, s, [&](int i) {
      int part = i % parts;
      std::size_t kind = 0;
      while (part >= window_parts_[kind]) part -= window_parts_[kind++];
      const Windows& w = run_.windows[kind];
      const auto start = [&](int number) { return int(std::size_t(w.count) * number / window_parts_[kind]); };
      pass_windows(w, first, i / parts, start(part), start(part + 1), s);
    });
  }

  // An image's windows from `start` until before `end` through all blocks.
  void pass_windows(const Windows& w, int first, int image, int start, int end, const Scratch& s) {
    const int count = end - start, rows = count * w.length, blocks = int(t_.blocks.size());
    const std::int32_t* tokens = w.tokens + std::size_t(start) * w.length;
    float *x = s.stream.get(), *packed = s.packed.get();
    for (int i = 0; i < rows; ++i) std::copy_n(row(image, tokens[i]), pitch_, x + i * pitch_);
    const float** own = s.window_tokens.get();
    for (int i = 0; i < rows; ++i) own[i] = qkv(image, tokens[i]);
    for (int block = 0; block < blocks; ++block) {
      const TowerBlock& b = t_.blocks[block];
      const bool last = block + 1 == blocks;
      const int step = last ? w.length : 1;  // in the last block nobody reads more than the class token
      if (block > 0) {
        project_windows(b, w.length, count, last, s);
        for (int i = 0; i < rows; ++i) own[i] = packed + i * head_.pitch;
      }
      attend_windows(own, w.length, count, last, s);
      const int wanted = rows / step;
      const auto add = [&](int i, int column, Vec v) {
        float* at = x + i * step * pitch_ + column;
        store(at, load(at) + v);
      };
      apply(b.proj, s.x.get(), s.x_pitch, wanted, s, add);
      for (int i = 0; i < wanted; ++i)
        normalise(x + i * step * pitch_, b.norm2, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
      feed_forward(b, wanted, s, add);
    }
    float* out = w.out + (std::size_t(first + image) * w.count + start) * t_.width;
    for (int i = 0; i < count; ++i) std::copy_n(x + i * w.length * pitch_, t_.width, out + std::size_t(i) * t_.width);
  }

  // Queries, keys and values of windows. only_first: queries of class tokens alone.
  void project_windows(const TowerBlock& b, int length, int count, bool only_first, const Scratch& s) const {
    const auto some = [&](int first, int last, int step) {
      const int rows = count * length / step;
      for (int i = 0; i < rows; ++i)
        normalise(s.stream.get() + i * step * pitch_, b.norm1, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
      float* to = s.packed.get() + first * kColumns;
      apply(part_of(b.qkv, first, last), s.x.get(), s.x_pitch, rows, s,
            [&](int i, int column, Vec v) { store(to + i * step * head_.pitch + column, v); });
    };
    const int panels = b.qkv.outputs / kColumns;
    if (!only_first) return some(0, panels, 1);
    some(0, int(pitch_) / kColumns, length);
    some(t_.width / kColumns, panels, 1);
  }

  void attend_windows(const float* const* rows, int length, int count, bool only_first, const Scratch& s) const {
    const During during(s.clock, Part::kAttention);
    const Attention a{length, head_.width, head_.pitch, head_.scale};
    const float** own = s.head_tokens.get();
    const int queries = only_first ? 1 : length;
    for (int window = 0; window < count; ++window)
      for (int number = 0; number < t_.heads; ++number) {
        for (int i = 0; i < length; ++i) own[i] = rows[window * length + i] + number * a.width;
        attend_window(a, own, queries, t_.width, s.turned.get(),
                      s.x.get() + window * queries * s.x_pitch + number * a.width, s.x_pitch);
      }
  }

  void embed(int first, int image, int start, const Scratch& s) {
    const int count = std::min(tile_, tokens_ - start), side = t_.grid * t_.patch;
    const float* pixels = run_.images + std::size_t(first + image) * 3 * side * side;
    for (int i = 0; i < count; ++i) {
      float* out = s.x.get() + i * s.x_pitch;
      const int p = start + i - t_.front;
      if (p < 0) {
        std::fill_n(out, t_.patches.inputs, 0.0f);
        continue;
      }
      for (int line = 0; line < 3 * t_.patch; ++line) {
        const int y = line / t_.patch * side + p / t_.grid * t_.patch + line % t_.patch;
        std::copy_n(pixels + std::size_t(y) * side + p % t_.grid * t_.patch, t_.patch, out + line * t_.patch);
      }
    }
    apply(t_.patches, s.x.get(), s.x_pitch, count, s,
          [&](int i, int column, Vec v) { store(row(image, start + i) + column, v); });
    for (int i = 0; i < count; ++i) {
      float* x = row(image, start + i);
      const float* position = t_.positions + std::size_t(start + i) * t_.width;
      for (int c = 0; c < t_.width; ++c) x[c] += position[c];
      if (t_.pre_norm.weight) normalise(x, t_.pre_norm, t_.width, t_.eps, x, s.clock);
    }
    if (run_.depth > 0 || !run_.windows.empty()) project(0, image, start, count, s);
  }

  // Queries, keys and values of a block.
  void project(int block, int image, int start, int count, const Scratch& s) {
    const TowerBlock& b = t_.blocks[block];
    for (int i = 0; i < count; ++i)
      normalise(row(image, start + i), b.norm1, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
    apply(b.qkv, s.x.get(), s.x_pitch, count, s,
          [&](int i, int column, Vec v) { store(qkv(image, start + i) + column, v); });
    if (!t_.cosine) return;
    const int half = head_.width / 2;
    for (int i = 0; i < count; ++i)
      for (int number = 0; number < 2 * t_.heads; ++number) {  // queries, then keys
        float* x = qkv(image, start + i) + number * head_.width;
        const std::size_t at = std::size_t(start + i) * half;
        for (int c = 0; c < half; ++c) {
          const float a = x[c], b = x[c + half];
          x[c] = a * t_.cosine[at + c] - b * t_.sine[at + c];
          x[c + half] = b * t_.cosine[at + c] + a * t_.sine[at + c];
        }
      }
  }

  void pack(int image, int number, const Scratch& s) {
    const During during(s.clock, Part::kLayout);
    const float *keys = qkv(image, 0) + t_.width + number * head_.width, *values = keys + t_.width;
#if defined(__AVX512VNNI__)
    if (t_.int8) return pack_head(head_, keys, values, head(image, number));
#endif
    pack_float_head(head_, keys, values, head(image, number));
  }

  // A tile through the rest of a block, what is tapped there, and the next block's queries, keys and values.
  void pass(int first, int block, int image, int start, bool one, const Scratch& s) {
    const int count = one ? 1 : std::min(tile_, tokens_ - start);
    const TowerBlock& b = t_.blocks[block];
    for (int number = 0; number < t_.heads; ++number)
      for (int i = 0; i < count; i += kQueries) {
        const float* queries = qkv(image, start + i) + number * head_.width;
        float* out = s.x.get() + i * s.x_pitch + number * head_.width;
        const int rows = std::min(kQueries, count - i);
#if defined(__AVX512VNNI__)
        if (t_.int8) {
          attend(head_, queries, rows, head(image, number), s, out, s.x_pitch);
          continue;
        }
#endif
        attend_floats(head_, queries, rows, head(image, number), s, out, s.x_pitch);
      }
    const auto add = [&](int i, int column, Vec v) {
      float* x = row(image, start + i) + column;
      store(x, load(x) + v);
    };
    apply(b.proj, s.x.get(), s.x_pitch, count, s, add);
    for (int i = 0; i < count; ++i)
      normalise(row(image, start + i), b.norm2, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
    feed_forward(b, count, s, add);
    hand_out(first, block, image, start, count, s);
    if (block + 1 < run_.depth) project(block + 1, image, start, count, s);
  }

  template <typename Add>
  void feed_forward(const TowerBlock& b, int count, const Scratch& s, const Add& add) const {
    float* hidden = s.hidden.get();
    const auto activate = [&](auto function) {
      apply(b.fc1, s.x.get(), s.x_pitch, count, s,
            [&](int i, int column, Vec v) { store(hidden + i * s.hidden_pitch + column, function(v)); });
    };
    if (t_.activation == Activation::kGelu) {
      if (b.fc2.codes)
        activate([](Vec v) { return rough_gelu(v); });
      else
        activate([](Vec v) { return gelu(v); });
    }
    if (t_.activation == Activation::kQuickGelu) activate([](Vec v) { return v * sigmoid(v * 1.702f); });
    if (t_.activation == Activation::kSwiGlu) {
      activate([](Vec v) { return v; });
      const int inner = b.fc2.inputs;
      for (int i = 0; i < count; ++i) {
        float* gate = hidden + i * s.hidden_pitch;
        for (int c = 0; c < inner; ++c) gate[c] *= gate[inner + c] / (1.0f + std::exp(-gate[c]));
      }
    }
    apply(b.fc2, hidden, s.hidden_pitch, count, s, add);
  }

  void hand_out(int first, int block, int image, int start, int count, const Scratch& s) const {
    for (const Tap& tap : run_.taps)
      if (tap.block == block)
        for (int i = std::max(0, t_.front - start); i < count; ++i) {
          float* out = tap.out + (first + image) * tap.image + std::size_t(start + i - t_.front) * t_.width;
          if (tap.normed)
            normalise(row(image, start + i), t_.norm, t_.width, t_.eps, out, s.clock);
          else
            std::copy_n(row(image, start + i), t_.width, out);
        }
    if (run_.classes && block == run_.depth - 1 && start == 0)
      std::copy_n(row(image, 0), t_.width, run_.classes + std::size_t(first + image) * t_.width);
  }

  const Tower& t_;
  const TowerRun& run_;
  const int tokens_;
  const Attention head_;
  const std::size_t pitch_, head_bytes_;
  const int group_, tile_, tiles_;
  const std::vector<int> window_parts_;
  const Buffer<float> stream_, packed_;
  const Buffer<unsigned char> heads_;
  Barrier barrier_;
  std::vector<std::atomic<int>> next_;  // of each phase: what no thread has taken
  std::vector<std::unique_ptr<Scratch>> scratch_;
};

}  // namespace

void ZSAD_JOIN(image_tower_, ZSAD_TARGET)(const Tower& tower, const TowerRun& run) { Forward(tower, run).run(); }

}  // namespace zsad
