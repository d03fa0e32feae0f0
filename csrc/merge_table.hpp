// Which pairs of symbols merge, and into what: a perfect hash, so that an answer takes two loads and no search.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpt {

// A symbol is a stretch of text that merging can reach: a piece, or a character that some piece holds.
using Symbol = std::uint32_t;
inline constexpr Symbol kNoSymbol = 0xffffffffu;

struct Merge {
  Symbol left;
  Symbol right;
  Symbol merged;
};

// Hash and displace (Belazzougui, Botelho, Dietzfelbinger 2009): pairs fall into groups of about four; each
// group has a number, found when the table is made, that sends its pairs to places no other pair has.
class MergeTable {
 public:
  static constexpr int kSymbolBits = 21;
  static constexpr Symbol kMaxSymbol = (Symbol{1} << kSymbolBits) - 2;

  // Each pair of `merges` must be there once; its symbols at most kMaxSymbol. Throws std::invalid_argument
  // where no table is found.
  explicit MergeTable(const std::vector<Merge>& merges);

  // What two neighbours become; kNoSymbol where they stay two. Symbols must be at most kMaxSymbol.
  Symbol find(Symbol left, Symbol right) const {
    const std::uint64_t pair = pack(left, right);
    const std::uint64_t hash = pair * multiplier_;
    const std::uint64_t entry = entries_[place(hash, displacements_[hash >> group_shift_])];
    return (entry >> kSymbolBits) == pair ? static_cast<Symbol>(entry & kMask) : kNoSymbol;
  }

  // A well mixed number of a pair, for other tables.
  static std::uint64_t hash(Symbol left, Symbol right) { return pack(left, right) * kFirstMultiplier; }

 private:
  static constexpr std::uint64_t kMask = (std::uint64_t{1} << kSymbolBits) - 1;
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  static constexpr std::uint64_t kFirstMultiplier = 0x9e3779b97f4a7c15u;

  static std::uint64_t pack(Symbol left, Symbol right) { return (std::uint64_t{left} << kSymbolBits) | right; }

  std::size_t place(std::uint64_t hash, std::uint32_t displacement) const {
    const auto mixed = static_cast<std::uint32_t>(hash >> 16) ^ (displacement * 0x9e3779b1u);
    return (std::uint64_t{mixed} * size_) >> 32;
  }

  bool fill(const std::vector<Merge>& merges);

  std::vector<std::uint64_t> entries_;  // left, right, merged
  std::vector<std::uint16_t> displacements_;
  std::uint64_t multiplier_ = kFirstMultiplier;
  std::uint64_t size_;
  unsigned group_shift_ = 0;
};

}  // namespace cpt
