// A stand-in for the CUDA language, so that the kernels of this folder run as host C++17 in the test suite.
//
// Every thread of a block is a fiber that runs until it waits at a barrier or a warp collective; the fibers run in
// random order, the blocks too. A missing barrier therefore reads what is not written yet, or what is already
// overwritten, in some order. Shared memory is poisoned before every block and fenced by canaries. An asynchronous copy
// poisons its target when it starts and lands as late as it may, when its own thread waits for it. A product of a
// warpgroup poisons its sums until their thread waits. Refused, with the line: a barrier or collective reached at
// different lines, by a part of the block or warp only, or after some have returned; copies, matrix loads and descriptors that are
// unaligned or outside shared memory; a thread that returns before its copies landed or its products ended; products of
// what no proxy fence has shown to them, of what changes before they end, and without a fence between them and the last
// wait (the ISA asks for one only where sums are touched).
//
// Not seen: timing, bank conflicts, unaligned vector loads, and races between blocks or inside a warp that need the
// memory model.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define ZSAD_KERNEL(max_threads, min_blocks) extern "C" void
#define ZSAD_DEVICE inline
#define ZSAD_SHARED(type, name) type* const name = reinterpret_cast<type*>(zsad_host::block.shared())

typedef unsigned short half_bits;
static inline float half_to_float(half_bits h);

namespace zsad_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kWarpSize = 32;
constexpr size_t kStack = 64 * 1024;
constexpr unsigned char kPoison = 0x7b;  // as float 1.3e36, as int 2.07e9: visible in sums and in maxima
constexpr size_t kFence = 256;

struct Copy {
  void* target;
  const void* source;
  int line;
};

constexpr size_t kCopyBytes = 16;
constexpr unsigned kWindow = 1024;  // where shared memory starts as the hardware counts: the driver has what is before
constexpr int kGroupWarps = 4, kGroupColumns = 128;

// What a warpgroup's product reads: the places of its factors, and what was there when it started.
struct Factors {
  int line;
  std::vector<const unsigned char*> places;
  std::vector<unsigned char> bytes;
};

// A thread's part of a warpgroup's product that has not ended: the sums that are its own.
struct Product {
  void* sums;
  std::vector<uint32_t> result;
  std::shared_ptr<const Factors> factors;
};

// How many lanes of a warp wait where: arrivals ask this instead of every lane.
struct Warp {
  int at_barrier = 0, at_collective = 0, returned = 0;
  int line = 0;  // of the collective
  size_t products = 0;  // that it started with its warpgroup
};

struct Fiber {
  ucontext_t start;
  jmp_buf position;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Index thread;
  bool started = false, done = false;
  int waits_at = 0;    // line of the barrier or collective, 0 while runnable
  uint64_t value = 0;  // what the lane brings to a warp collective
  int parameter = 0;
  uint64_t result = 0;
  std::vector<Copy> open_copies;                // of the group not yet closed
  std::deque<std::vector<Copy>> closed_copies;  // groups under way, oldest first
  std::vector<void*> landed;                    // targets of copies that no product may see yet
  bool ordered = false;                         // what was done with sums before the next product
  std::vector<Product> open_products, closed_products;
};

// One block at a time; fibers are switched with _setjmp, which leaves the signal mask alone and is fast.
class Block {
 public:
  Index grid, dim, index;

  void* shared() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data() + kFence) + 15) & ~uintptr_t(15));
  }
  const Index& thread() const { return current_->thread; }

  void run(Index block_index, size_t shared_bytes, std::mt19937& random, std::function<void()> kernel) {
    index = block_index;
    kernel_ = std::move(kernel);
    shared_bytes_ = shared_bytes;
    memory_.assign(shared_bytes + 2 * kFence + 16, kPoison);
    shown_.assign(shared_bytes, kPoison);
    const unsigned threads = dim.x * dim.y * dim.z;
    if (threads == 0 || threads > 1024 || threads % kWarpSize)
      throw std::runtime_error("a block must be 1 to 32 whole warps");
    fibers_.resize(threads);
    warps_.assign(threads / kWarpSize, Warp());
    groups_.assign(threads / kWarpSize / kGroupWarps, {});
    at_barrier_ = 0;
    std::vector<Fiber*> everyone;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = fibers_[t];
      f.thread = {t % dim.x, t / dim.x % dim.y, t / (dim.x * dim.y)};
      f.started = f.done;  // where the last launch failed, its fibers are in the midst of a kernel
      f.done = false;
      f.waits_at = 0;
      f.open_copies.clear();
      f.closed_copies.clear();
      f.landed.clear();
      f.ordered = false;
      f.open_products.clear();
      f.closed_products.clear();
      everyone.push_back(&f);
    }
    // One step of everyone in random order, or one warp as far as it gets: the latter overtakes whole collectives.
    left_ = threads;
    while (left_ > 0) {
      if (random() & 1) {
        const auto warp = everyone.begin() + random() % (threads / kWarpSize) * kWarpSize;
        std::vector<Fiber*> lanes(warp, warp + kWarpSize);
        std::shuffle(lanes.begin(), lanes.end(), random);
        while (step(lanes)) {
        }
      } else {
        std::vector<Fiber*> order = everyone;
        std::shuffle(order.begin(), order.end(), random);
        if (!step(order) && left_ > 0) throw std::runtime_error(describe_deadlock());
      }
    }
    check_fence();
    check_groups();
  }

  void barrier(int line) {
    if (left_ < fibers_.size()) fail("a thread has returned before a barrier of its block", line);
    if (at_barrier_ && line != barrier_line_) fail("threads of a block wait at different barriers", line);
    barrier_line_ = line;
    ++warps_[warp_of(*current_)].at_barrier;
    if (++at_barrier_ < fibers_.size()) return suspend(line);
    at_barrier_ = 0;
    for (Warp& each : warps_) each.at_barrier = 0;
    for (Fiber& f : fibers_) f.waits_at = 0;
  }

  // Full-warp collective: every lane brings a value and a parameter; `combine` fills the results of all 32 lanes.
  template <class Combine>
  uint64_t collective(unsigned mask, uint64_t value, int parameter, int line, Combine combine) {
    if (mask != 0xffffffffu) fail("only full-warp collectives are emulated", line);
    current_->value = value;
    current_->parameter = parameter;
    Warp& warp = warps_[warp_of(*current_)];
    if (warp.returned) fail("a lane has returned before a warp collective", line);
    if (warp.at_barrier || (warp.at_collective && warp.line != line))
      fail("a warp collective is reached by some lanes only", line);
    warp.line = line;
    if (++warp.at_collective < kWarpSize) {
      suspend(line);
    } else {
      warp.at_collective = 0;
      Fiber* lanes = &fibers_[warp_of(*current_) * kWarpSize];
      combine(lanes);
      for (int l = 0; l < kWarpSize; ++l) lanes[l].waits_at = 0;
    }
    return current_->result;
  }

  void start_copy(void* base, int offset, const void* source, int line) {
    unsigned char* const target = static_cast<unsigned char*>(base) + offset;
    check_shared(target, line);
    if (reinterpret_cast<uintptr_t>(source) % kCopyBytes) fail("an asynchronous copy reads an unaligned address", line);
    memset(target, kPoison, kCopyBytes);
    memset(shown(target), kPoison, kCopyBytes);
    current_->open_copies.push_back({target, source, line});
  }

  void close_copies() {
    current_->closed_copies.push_back(std::move(current_->open_copies));
    current_->open_copies.clear();
  }

  void wait_for_copies(size_t open) {
    for (auto& groups = current_->closed_copies; groups.size() > open; groups.pop_front())
      for (const Copy& copy : groups.front()) {
        memcpy(copy.target, copy.source, kCopyBytes);
        current_->landed.push_back(copy.target);
      }
  }

  void show_copies() {
    for (void* const target : current_->landed) memcpy(shown(target), target, kCopyBytes);
    current_->landed.clear();
  }

  unsigned shared_address(const void* pointer) const {
    return kWindow + unsigned(static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(shared()));
  }

  void order_sums() { current_->ordered = true; }

  // Start a warp's part of its warpgroup's product: sums [kGroupColumns / 2] are this thread's.
  // `multiply(bytes, sums)` adds the products of 16 rows and the columns, 32 bytes each, to those of all lanes.
  template <class Sum, class Multiply>
  void start_product(Sum* sums, uint64_t a, uint64_t b, int line, Multiply multiply) {
    if (!current_->ordered) fail("a warpgroup's product is not ordered after what was done with its sums", line);
    struct Part {
      uint64_t a, b;
      std::vector<uint32_t> sums;
      std::shared_ptr<const Factors> factors;
    } part = {a, b, latest(sums), nullptr};
    collective(0xffffffffu, reinterpret_cast<uintptr_t>(&part), 0, line, [&](Fiber* lanes) {
      Part* parts[kWarpSize];
      std::vector<uint32_t>* all[kWarpSize];
      for (int l = 0; l < kWarpSize; ++l) {
        parts[l] = reinterpret_cast<Part*>(uintptr_t(lanes[l].value));
        if (parts[l]->a != a || parts[l]->b != b) fail("threads of a warpgroup multiply different factors", line);
        all[l] = &parts[l]->sums;
      }
      const unsigned warp = warp_of(*lanes);
      start_with_group(warp, {a, b}, line);
      const auto factors = std::make_shared<Factors>();
      factors->line = line;
      find_rows(a, warp % kGroupWarps * 16, 16, *factors);
      find_rows(b, 0, kGroupColumns, *factors);
      for (Part* const each : parts) each->factors = factors;
      multiply(factors->bytes.data(), all);
    });
    memset(static_cast<void*>(sums), kPoison, part.sums.size() * sizeof(Sum));
    current_->open_products.push_back({sums, std::move(part.sums), std::move(part.factors)});
  }

  void close_products() {
    auto& open = current_->open_products;
    std::move(open.begin(), open.end(), std::back_inserter(current_->closed_products));
    open.clear();
  }

  // All whose groups are closed end. Until then their factors stay as they are, which one lane of a warp looks after.
  void wait_for_products() {
    for (const Product& product : current_->closed_products) {
      const Factors& read = *product.factors;
      for (size_t i = 0; i < read.places.size() && current_->thread.x % kWarpSize == 0; ++i)
        if (memcmp(read.places[i], &read.bytes[i * kCopyBytes], kCopyBytes))
          fail("what a warpgroup multiplies is overwritten before it has", read.line);
      memcpy(product.sums, product.result.data(), product.result.size() * sizeof(uint32_t));
    }
    for (const Product& product : current_->open_products)
      memset(product.sums, kPoison, product.result.size() * sizeof(uint32_t));
    current_->closed_products.clear();
    current_->ordered = false;
  }

  // Refuse an address that is not that of 16 aligned bytes of shared memory.
  void check_shared(const void* address, int line) {
    const auto base = reinterpret_cast<uintptr_t>(shared()), at = reinterpret_cast<uintptr_t>(address);
    if (at < base || at + kCopyBytes > base + shared_bytes_) fail("an address outside shared memory", line);
    if (at % kCopyBytes) fail("an unaligned address in shared memory", line);
  }

  // Called by a fiber at its end.
  void check_end() {
    close_copies();
    close_products();
    for (const auto& group : current_->closed_copies)
      for (const Copy& copy : group) fail("a thread has returned before its copies landed", copy.line);
    for (const Product& product : current_->closed_products)
      fail("a thread has returned before its products ended", product.factors->line);
  }

 private:
  std::vector<Fiber> fibers_;
  std::vector<unsigned char> memory_;
  std::vector<unsigned char> shown_;  // shared memory as products see it
  size_t shared_bytes_ = 0;
  std::function<void()> kernel_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::string failure_;
  std::vector<Warp> warps_;
  std::vector<std::vector<std::pair<uint64_t, uint64_t>>> groups_;  // the factors of a warpgroup's products so far
  size_t left_ = 0;        // fibers that have not returned
  size_t at_barrier_ = 0;  // fibers that wait at the barrier in this line
  int barrier_line_ = 0;

  unsigned warp_of(const Fiber& f) const { return unsigned(&f - fibers_.data()) / kWarpSize; }
  unsigned char* shown(const void* at) { return &shown_[shared_address(at) - kWindow]; }

  // The warps of a warpgroup start the same products, each when it comes to them.
  void start_with_group(unsigned warp, std::pair<uint64_t, uint64_t> factors, int line) {
    if (warp / kGroupWarps >= groups_.size()) fail("a warpgroup has four warps", line);
    auto& group = groups_[warp / kGroupWarps];
    const size_t number = warps_[warp].products++;
    if (number == group.size()) group.push_back(factors);
    if (group[number] != factors) fail("threads of a warpgroup multiply different factors", line);
  }

  void check_groups() const {
    for (size_t warp = 0; warp < groups_.size() * kGroupWarps; ++warp)
      if (warps_[warp].products != groups_[warp / kGroupWarps].size())
        throw std::runtime_error("a part of a warpgroup leaves out a product");
  }

  // What a thread's sums will be once its products have ended.
  template <class Sum>
  std::vector<uint32_t> latest(const Sum* sums) const {
    for (const auto* products : {&current_->open_products, &current_->closed_products})
      for (auto product = products->rbegin(); product != products->rend(); ++product)
        if (product->sums == sums) return product->result;
    std::vector<uint32_t> now(kGroupColumns / 2);
    memcpy(now.data(), sums, now.size() * sizeof(uint32_t));
    return now;
  }

  // Read the 32 bytes of each of some rows of a factor as its descriptor says; k-major, as the PTX ISA describes it.
  void find_rows(uint64_t descriptor, int first, int rows, Factors& factors) {
    const auto bytes = [&](int bit) { return unsigned(descriptor >> bit & 0x3fff) << 4; };
    const unsigned swizzle = unsigned(descriptor >> 62);  // none, 128, 64 or 32 bytes
    if (descriptor >> 49 & 7) fail("only a base offset of 0 is emulated", factors.line);
    const unsigned width = swizzle ? 256u >> swizzle : 16, turned = width / 16 - 1;
    for (int row = first; row < first + rows; ++row)
      for (unsigned piece = 0; piece < 2; ++piece) {
        unsigned at = bytes(0) + row / 8 * bytes(32) + row % 8 * width + piece * (swizzle ? 16 : bytes(16));
        at ^= (at >> 7 & turned) << 4;
        if (at < kWindow || at + kCopyBytes > kWindow + shared_bytes_)
          fail("a descriptor reaches outside shared memory", factors.line);
        const unsigned char* const place = static_cast<unsigned char*>(shared()) + (at - kWindow);
        if (memcmp(place, shown(place), kCopyBytes))
          fail("a warpgroup multiplies what was not shown to it", factors.line);
        factors.places.push_back(place);
        factors.bytes.insert(factors.bytes.end(), place, place + kCopyBytes);
      }
  }

  // Resume every fiber that can run, in this order; tell whether there was one.
  bool step(const std::vector<Fiber*>& order) {
    bool any = false;
    for (Fiber* f : order) {
      if (f->done || f->waits_at) continue;
      any = true;
      resume(*f);
      if (!failure_.empty()) throw std::runtime_error(std::exchange(failure_, std::string()));
      if (!f->done) continue;
      --left_;
      ++warps_[warp_of(*f)].returned;
    }
    return any;
  }

  static void entry();

  __attribute__((noinline)) void resume(Fiber& f) {
    current_ = &f;
    if (_setjmp(scheduler_)) return;
    if (f.started) _longjmp(f.position, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
    setcontext(&f.start);
  }

  __attribute__((noinline)) void suspend(int line) {
    current_->waits_at = line;
    if (!_setjmp(current_->position)) _longjmp(scheduler_, 1);
  }

  // Exceptions must not leave a fiber; the scheduler throws in its place.
  void fail(const char* what, int line) {
    failure_ = std::string(what) + ", line " + std::to_string(line);
    _longjmp(scheduler_, 1);
  }

  std::string describe_deadlock() const {
    for (const Fiber& f : fibers_)
      if (!f.done) return "a part of the block waits for ever, line " + std::to_string(f.waits_at);
    return "no thread can run";
  }

  void check_fence() const {
    const unsigned char* base = static_cast<unsigned char*>(shared());
    for (const unsigned char* p = memory_.data(); p < base; ++p)
      if (*p != kPoison) throw std::runtime_error("written before shared memory");
    for (const unsigned char* p = base + shared_bytes_; p < memory_.data() + memory_.size(); ++p)
      if (*p != kPoison) throw std::runtime_error("written past shared memory");
  }
};

static Block block;

// A fiber that has returned waits for the next block, whose kernel it then runs: starting one takes two system calls.
inline void Block::entry() {
  for (;;) {
    block.kernel_();
    block.check_end();
    block.current_->done = true;
    block.suspend(0);
  }
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) >= sizeof(From), "bits would be lost");
  To to{};
  memcpy(&to, &from, sizeof(From));
  return to;
}

template <class T>
T low_bits(uint64_t from) {
  T to;
  memcpy(&to, &from, sizeof(T));
  return to;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int other, int line) {
  return low_bits<T>(block.collective(mask, bits<uint64_t>(value), other, line, [](Fiber* lanes) {
    for (int l = 0; l < kWarpSize; ++l) lanes[l].result = lanes[l ^ lanes[l].parameter].value;
  }));
}

inline int reduce_max(unsigned mask, int value, int line) {
  return low_bits<int>(block.collective(mask, bits<uint64_t>(value), 0, line, [](Fiber* lanes) {
    int best = low_bits<int>(lanes[0].value);
    for (int l = 1; l < kWarpSize; ++l) best = std::max(best, low_bits<int>(lanes[l].value));
    for (int l = 0; l < kWarpSize; ++l) lanes[l].result = bits<uint64_t>(best);
  }));
}

// The lanes of a warp bring pointers to their arguments.
template <class T, class Combine>
void exchange(T& mine, int line, Combine combine) {
  block.collective(0xffffffffu, reinterpret_cast<uintptr_t>(&mine), 0, line, [&](Fiber* lanes) {
    T* all[kWarpSize];
    for (int l = 0; l < kWarpSize; ++l) all[l] = reinterpret_cast<T*>(uintptr_t(lanes[l].value));
    combine(all);
  });
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, as described in device.h.
inline void load_matrices(unsigned (&out)[4], const void* shared, int offset, int line) {
  struct Lane {
    unsigned* out;
    const unsigned char* row;
  } lane = {out, static_cast<const unsigned char*>(shared) + offset};
  block.check_shared(lane.row, line);
  exchange(lane, line, [](Lane** lanes) {
    for (int m = 0; m < 4; ++m)
      for (int l = 0; l < kWarpSize; ++l) memcpy(&lanes[l]->out[m], lanes[8 * m + l / 4]->row + 4 * (l % 4), 4);
  });
}

// Entry i of 4 bytes that hold signed bytes or fp16.
inline int entry(unsigned word, int i, int) { return int8_t(word >> 8 * i); }
inline float entry(unsigned word, int i, float) { return half_to_float(half_bits(word >> 16 * i)); }

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 and m16n8k32.row.col.s32.s8.s8.s32; the fragments are those of the
// PTX ISA, in which both are alike but for the number of entries in 4 bytes.
template <class Sum>
void multiply_add(Sum (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line) {
  struct Lane {
    Sum* sums;
    const unsigned* a;
    unsigned b[2];
  } lane = {sums, a, {b0, b1}};
  exchange(lane, line, [](Lane** lanes) {
    constexpr int kPacked = std::is_same<Sum, float>::value ? 2 : 4, kDepth = 8 * kPacked;
    Sum left[16][kDepth], right[kDepth][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const int group = l / 4, first = l % 4 * kPacked;
      for (int i = 0; i < kPacked; ++i) {
        left[group][first + i] = entry(lanes[l]->a[0], i, Sum());
        left[group + 8][first + i] = entry(lanes[l]->a[1], i, Sum());
        left[group][first + kDepth / 2 + i] = entry(lanes[l]->a[2], i, Sum());
        left[group + 8][first + kDepth / 2 + i] = entry(lanes[l]->a[3], i, Sum());
        right[first + i][group] = entry(lanes[l]->b[0], i, Sum());
        right[first + kDepth / 2 + i][group] = entry(lanes[l]->b[1], i, Sum());
      }
    }
    for (int l = 0; l < kWarpSize; ++l)
      for (int c = 0; c < 4; ++c) {
        const int row = l / 4 + c / 2 * 8, column = l % 4 * 2 + c % 2;
        for (int k = 0; k < kDepth; ++k) lanes[l]->sums[c] += left[row][k] * right[k][column];
      }
  });
}

// wgmma.mma_async.m64n128k16.f32.f16.f16 and m64n128k32.s32.s8.s8, both factors from shared memory.
template <class Sum, size_t Sets>
void multiply_group(Sum (&sums)[Sets][4], uint64_t a, uint64_t b, int line) {
  static_assert(8 * Sets == kGroupColumns && sizeof(Sum) == sizeof(uint32_t), "other shapes are not emulated");
  block.start_product(&sums[0][0], a, b, line, [](const unsigned char* bytes, auto& sums_of) {
    constexpr int kPacked = std::is_same<Sum, float>::value ? 2 : 4, kDepth = 8 * kPacked, kRows = 16;
    Sum factors[kRows + kGroupColumns][kDepth];
    for (int row = 0; row < kRows + kGroupColumns; ++row)
      for (int k = 0; k < kDepth; ++k) {
        unsigned word;
        memcpy(&word, bytes + (row * kDepth + k) / kPacked * 4, 4);
        factors[row][k] = entry(word, k % kPacked, Sum());
      }
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int c = 0; c < kGroupColumns / 2; ++c) {
        const Sum* const left = factors[lane / 4 + c / 2 % 2 * 8];
        const Sum* const right = factors[kRows + c / 4 * 8 + lane % 4 * 2 + c % 2];
        uint32_t& place = (*sums_of[lane])[c];
        Sum sum = low_bits<Sum>(place);
        for (int k = 0; k < kDepth; ++k) sum += left[k] * right[k];
        place = bits<uint32_t>(sum);
      }
  });
}

struct Launch {
  Index grid, block;
  uint64_t shared_bytes;
  uint32_t seed;
  char error[256];
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

// arguments: one pointer per kernel argument, as for cuLaunchKernel.
template <class... A>
int launch(void (*kernel)(A...), Launch* how, void** arguments) try {
  std::mt19937 random(how->seed);
  std::vector<Index> indices;
  for (unsigned z = 0; z < how->grid.z; ++z)
    for (unsigned y = 0; y < how->grid.y; ++y)
      for (unsigned x = 0; x < how->grid.x; ++x) indices.push_back({x, y, z});
  std::shuffle(indices.begin(), indices.end(), random);
  block.grid = how->grid;
  block.dim = how->block;
  for (const Index& index : indices)
    block.run(index, how->shared_bytes, random, [&] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
  return 0;
} catch (const std::exception& error) {
  snprintf(how->error, sizeof how->error, "%s", error.what());
  return 1;
}

}  // namespace zsad_host

// One entry point per kernel, which the tests append to the source.
#define ZSAD_ENTRY extern "C" __attribute__((visibility("default"))) int

#define threadIdx (zsad_host::block.thread())
#define blockIdx (zsad_host::block.index)
#define blockDim (zsad_host::block.dim)
#define gridDim (zsad_host::block.grid)
#define __syncthreads() zsad_host::block.barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lane) zsad_host::shuffle_xor(mask, value, lane, __LINE__)
#define __reduce_max_sync(mask, value) zsad_host::reduce_max(mask, value, __LINE__)
#define load_matrices(out, shared, offset) zsad_host::load_matrices(out, shared, offset, __LINE__)
#define multiply_add(sums, a, b0, b1) zsad_host::multiply_add(sums, a, b0, b1, __LINE__)
#define copy_async(shared, offset, global) zsad_host::block.start_copy(shared, offset, global, __LINE__)


static inline unsigned shared_address(const void* pointer) { return zsad_host::block.shared_address(pointer); }
static inline void close_copies() { zsad_host::block.close_copies(); }

template <int Open>
void wait_for_copies() {
  zsad_host::block.wait_for_copies(Open);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define multiply_group(sums, a, b) zsad_host::multiply_group(sums, a, b, __LINE__)
static inline void show_copies() { zsad_host::block.show_copies(); }
static inline void close_products() { zsad_host::block.close_products(); }

template <class Sums>
void order_sums(Sums&) {
  zsad_host::block.order_sums();
}

template <class Sums>
void wait_for_products(Sums&) {
  zsad_host::block.wait_for_products();
}
#endif

static inline void keep(const float*&) {}

static inline void load_if(bool wanted, const float* from, float& value) {
  if (wanted) value = *from;
}

static inline int __float_as_int(float f) { return zsad_host::bits<int>(f); }
static inline float __int_as_float(int i) { return zsad_host::bits<float>(i); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }

using std::max;
using std::min;

// Fibers never run at the same time, so plain code is atomic.
static inline int atomicMax(int* address, int value) {
  const int old = *address;
  *address = std::max(old, value);
  return old;
}

static inline float half_to_float(half_bits h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) {
    const float value = ldexpf(float(mantissa), -24);
    return sign ? -value : value;
  }
  return zsad_host::bits<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

// Round to nearest, ties to even.
static inline half_bits float_to_half(float f) {
  const half_bits sign = signbit(f) ? 0x8000 : 0;
  const float magnitude = fabsf(f);
  if (magnitude == 0) return sign;
  if (isnan(f)) return sign | 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(magnitude, &exponent);
  exponent = std::max(exponent - 11, -24);  // weight of the last bit
  const uint32_t units = uint32_t(nearbyintf(ldexpf(magnitude, -exponent)));
  return half_bits(sign | (units + (uint32_t(exponent + 24) << 10)));
}
