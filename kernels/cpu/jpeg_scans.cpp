// See jpeg_scans.h. ITU-T T.81, sections F.2 and G.2, without arithmetic coding.
#include "jpeg_scans.h"

#include <algorithm>
#include <array>
#include <vector>

namespace zsad {
namespace {

constexpr int kMaxComponents = 4, kMaxSampling = 4, kTables = 4;
constexpr int kShort = 8;       // bits of codes that are looked up
constexpr int kSpareBytes = 2;  // behind a scan's last code, which some writer may have put there

struct Damaged {
  ScanDamage kind;
};
struct Foreign {};  // nothing that is told apart here

struct Huffman {
  std::array<std::uint8_t, 256> values{};
  std::array<std::int32_t, 17> last{};    // [length] largest code of it, -1: none
  std::array<std::int32_t, 17> offset{};  // [length] of its values, less its first code
  std::array<std::uint16_t, 1 << kShort> quick{};  // [next bits] length << 8 | value, 0: the code is longer
  bool known = false;
};

struct Component {
  int id = 0, across = 1, down = 1;     // sampling
  int columns = 0, rows = 0, pitch = 0;  // blocks in a scan of its own; in a row with those that fill up the last MCU
  std::vector<std::uint64_t> nonzero;    // [block] which coefficients are not zero, in zigzag order
};

// The bits of one entropy-coded part, up to the next marker.
class Bits {
 public:
  Bits(const std::uint8_t* at, const std::uint8_t* end) : at_(at), end_(end) {}

  std::uint32_t peek(int count) {  // 1 to 16; zeros once there are no more
    if (held_ < count) fill();
    return std::uint32_t(buffer_ >> (64 - count));
  }
  void drop(int count) {
    if (count > held_) throw Damaged{ScanDamage::kEndsEarly};
    buffer_ <<= count;
    held_ -= count;
  }
  std::uint32_t take(int count) {
    if (!count) return 0;
    const std::uint32_t value = peek(count);
    drop(count);
    return value;
  }
  void skip(int count) {
    for (; count > 16; count -= 16) take(16);
    take(count);
  }
  // Returns where the next marker is, behind all bits but those that fill up the last byte.
  const std::uint8_t* finish() {
    int spare = held_ / 8;
    while (spare <= kSpareBytes) {
      fill();
      if (held_ / 8 == spare) return at_;
      spare = held_ / 8;
    }
    throw Damaged{ScanDamage::kGoesOn};
  }

 private:
  void fill() {
    while (held_ <= 56 && at_ < end_) {
      const std::uint64_t byte = *at_;
      if (byte == 0xFF) {
        const std::uint8_t* next = at_ + 1;
        while (next < end_ && *next == 0xFF) ++next;
        if (next == end_ || *next) return;  // a marker
        at_ = next;
      }
      ++at_;
      buffer_ |= byte << (56 - held_);
      held_ += 8;
    }
  }

  const std::uint8_t *at_, *end_;
  std::uint64_t buffer_ = 0;  // the next bits, from the highest one
  int held_ = 0;
};

int decoded(Bits& bits, const Huffman& table) {
  const std::int32_t ahead = std::int32_t(bits.peek(16));
  if (const int found = table.quick[ahead >> (16 - kShort)]) {
    bits.drop(found >> 8);
    return found & 0xFF;
  }
  for (int length = 1; length <= 16; ++length) {
    const std::int32_t code = ahead >> (16 - length);
    if (code <= table.last[length]) {
      bits.drop(length);
      return table.values[(code + table.offset[length]) & 0xFF];
    }
  }
  bits.drop(16);  // where there are none left, that is what is wrong
  throw Damaged{ScanDamage::kNoCode};
}

int bit_count(std::uint64_t bits) {
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
}

struct Scan {
  std::vector<Component*> components;
  std::vector<const Huffman*> tables;  // of each component: of DC or of AC
  int first = 0, last = 0;             // coefficients
  bool refines = false;
  std::uint32_t ends = 0;  // blocks that end where they are: the band of AC is at its end

  // Ends the scan, or a part of it that stands for itself; returns where the next marker is.
  const std::uint8_t* finish(Bits& bits) {
    if (ends) throw Damaged{ScanDamage::kGoesOn};
    return bits.finish();
  }

  void block(Bits& bits, int component, std::uint64_t& nonzero) {
    if (first == 0) {
      if (refines) {
        bits.take(1);
        return;
      }
      const int size = decoded(bits, *tables[component]);
      if (size > 16) throw Damaged{ScanDamage::kNoCode};
      bits.skip(size);
    } else if (refines) {
      refine(bits, nonzero);
    } else {
      begin(bits, nonzero);
    }
  }

 private:
  void end_of_band(Bits& bits, int run) { ends = (1u << run) + bits.take(run); }

  void begin(Bits& bits, std::uint64_t& nonzero) {
    for (int k = first; !ends && k <= last; ++k) {
      const int code = decoded(bits, *tables[0]), run = code >> 4, size = code & 15;
      if (!size && run < 15) {
        end_of_band(bits, run);
        break;
      }
      k += run;
      if (!size) continue;
      if (k > last) throw Damaged{ScanDamage::kNoCode};
      bits.skip(size);
      nonzero |= std::uint64_t(1) << k;
    }
    if (ends) --ends;
  }

  void refine(Bits& bits, std::uint64_t& nonzero) {
    int k = first;
    while (!ends && k <= last) {
      const int code = decoded(bits, *tables[0]), size = code & 15;
      int run = code >> 4;
      if (!size && run < 15) {
        end_of_band(bits, run);
        break;
      }
      if (size > 1) throw Damaged{ScanDamage::kNoCode};
      bits.skip(size);
      for (; k <= last; ++k) {
        if (nonzero >> k & 1)
          bits.take(1);
        else if (--run < 0)
          break;
      }
      if (size) {
        if (k > last) throw Damaged{ScanDamage::kNoCode};
        nonzero |= std::uint64_t(1) << k;
      }
      ++k;
    }
    if (!ends) return;
    const std::uint64_t band = ~std::uint64_t(0) >> (63 - last);
    if (k <= last) bits.skip(bit_count(nonzero & band & (~std::uint64_t(0) << k)));
    --ends;
  }
};

class Picture {
 public:
  Picture(const std::uint8_t* content, std::size_t size, int rows, int columns)
      : at_(content), end_(content + size), rows_(rows), columns_(columns) {}

  void follow() {
    if (marker() != 0xD8) throw Foreign{};
    for (int found = marker(); found != 0xD9; found = marker()) {
      if (found <= 1 || (found >= 0xD0 && found <= 0xD7)) continue;  // these stand alone
      const std::uint8_t* segment = at_ + 2;
      if (end_ - at_ < 2 || end_ - at_ < length_of(at_) || length_of(at_) < 2) throw Foreign{};
      at_ += length_of(at_);
      if (found == 0xC2)
        frame(segment);
      else if (found == 0xC4)
        tables(segment);
      else if (found == 0xDD)
        interval_ = size_of(segment) >= 2 ? length_of(segment) : 0;
      else if (found == 0xDA)
        scan(segment);
      else if (found >= 0xC0 && found <= 0xCF && found != 0xC8)
        throw Foreign{};
    }
  }

 private:
  static int length_of(const std::uint8_t* at) { return at[0] << 8 | at[1]; }
  std::ptrdiff_t size_of(const std::uint8_t* segment) const { return at_ - segment; }

  int marker() {  // the next one, to behind it
    at_ = std::find(at_, end_, 0xFF);
    at_ = std::find_if(at_, end_, [](std::uint8_t byte) { return byte != 0xFF; });
    if (at_ == end_) throw Foreign{};  // which the decoder says
    return *at_++;
  }

  void frame(const std::uint8_t* segment) {
    const int count = size_of(segment) >= 6 ? segment[5] : 0;
    if (!components_.empty() || count < 1 || count > kMaxComponents) throw Foreign{};
    if (size_of(segment) < 6 + 3 * count) throw Foreign{};
    if (segment[0] != 8 || length_of(segment + 1) != rows_ || length_of(segment + 3) != columns_) throw Foreign{};
    components_.resize(count);
    for (int index = 0; index < count; ++index) {
      Component& each = components_[index];
      const std::uint8_t* said = segment + 6 + 3 * index;
      each.id = said[0];
      each.across = said[1] >> 4;
      each.down = said[1] & 15;
      if (std::min(each.across, each.down) < 1 || std::max(each.across, each.down) > kMaxSampling) throw Foreign{};
      across_ = std::max(across_, each.across);
      down_ = std::max(down_, each.down);
    }
    const auto blocks = [](int pixels, int part, int whole) { return (pixels * part + 8 * whole - 1) / (8 * whole); };
    mcu_columns_ = blocks(columns_, 1, across_);
    mcu_rows_ = blocks(rows_, 1, down_);
    for (Component& each : components_) {
      each.columns = blocks(columns_, each.across, across_);
      each.rows = blocks(rows_, each.down, down_);
      each.pitch = mcu_columns_ * each.across;
      each.nonzero.resize(std::size_t(each.pitch) * mcu_rows_ * each.down);
    }
  }

  void tables(const std::uint8_t* segment) {
    while (size_of(segment) >= 17) {
      const int kind = segment[0] >> 4, number = segment[0] & 15;
      if (kind > 1 || number >= kTables) throw Foreign{};
      Huffman& table = tables_[kind][number];
      int code = 0, values = 0;
      for (int length = 1; length <= 16; ++length, code <<= 1) {
        const int count = segment[length];
        table.offset[length] = values - code;
        table.last[length] = count ? code + count - 1 : -1;
        code += count;
        values += count;
        if (values > 256 || code > 1 << length) throw Foreign{};
      }
      if (size_of(segment) < 17 + values) throw Foreign{};
      std::copy_n(segment + 17, values, table.values.begin());
      for (int bits = 0; bits < 1 << kShort; ++bits) {
        int length = 1;
        while (length <= kShort && bits >> (kShort - length) > table.last[length]) ++length;
        const int code = length <= kShort ? bits >> (kShort - length) : 0;
        table.quick[bits] = length <= kShort ? length << 8 | table.values[(code + table.offset[length]) & 0xFF] : 0;
      }
      table.known = true;
      segment += 17 + values;
    }
  }

  void scan(const std::uint8_t* segment) {
    const int count = size_of(segment) >= 1 ? segment[0] : 0;
    if (components_.empty() || count < 1 || count > kMaxComponents || size_of(segment) < 4 + 2 * count) throw Foreign{};
    const std::uint8_t* band = segment + 1 + 2 * count;
    Scan scan;
    scan.first = band[0];
    scan.last = band[1];
    scan.refines = band[2] >> 4;
    if (scan.last > 63 || scan.first > scan.last || (scan.first ? count > 1 : scan.last > 0)) throw Foreign{};
    for (int index = 0; index < count; ++index) {
      const std::uint8_t* said = segment + 1 + 2 * index;
      const auto found = std::find_if(components_.begin(), components_.end(), [&](auto& c) { return c.id == said[0]; });
      const int number = scan.first ? said[1] & 15 : said[1] >> 4;
      if (found == components_.end() || number >= kTables) throw Foreign{};
      const Huffman& table = tables_[scan.first > 0][number];
      if (!table.known && (scan.first || !scan.refines)) throw Foreign{};
      scan.components.push_back(&*found);
      scan.tables.push_back(&table);
    }
    read(scan);
  }

  void read(Scan& scan) {
    const bool alone = scan.components.size() == 1;
    const int across = alone ? scan.components[0]->columns : mcu_columns_;
    const int down = alone ? scan.components[0]->rows : mcu_rows_;
    Bits bits(at_, end_);
    int left = interval_, restart = 0;
    for (int row = 0; row < down; ++row) {
      for (int column = 0; column < across; ++column) {
        if (interval_ && left-- == 0) {
          at_ = scan.finish(bits);
          if (marker() != 0xD0 + restart) throw Damaged{ScanDamage::kPartMissing};
          restart = (restart + 1) & 7;
          left = interval_ - 1;
          bits = Bits(at_, end_);
        }
        for (std::size_t index = 0; index < scan.components.size(); ++index) {
          Component& each = *scan.components[index];
          const int wide = alone ? 1 : each.across, high = alone ? 1 : each.down;
          for (int y = 0; y < high; ++y)
            for (int x = 0; x < wide; ++x) {
              const std::size_t place = std::size_t(row * high + y) * each.pitch + column * wide + x;
              scan.block(bits, int(index), each.nonzero[place]);
            }
        }
      }
    }
    at_ = scan.finish(bits);
  }

  const std::uint8_t *at_, *end_;
  int rows_, columns_, across_ = 1, down_ = 1, mcu_rows_ = 0, mcu_columns_ = 0, interval_ = 0;
  std::vector<Component> components_;
  std::array<std::array<Huffman, kTables>, 2> tables_{};
};

}  // namespace

ScanDamage scan_damage(const std::uint8_t* content, std::size_t size, int rows, int columns) {
  try {
    Picture(content, size, rows, columns).follow();
  } catch (const Damaged& found) {
    return found.kind;
  } catch (const Foreign&) {
  }
  return ScanDamage::kNone;
}

}  // namespace zsad
