// Merging the symbols of one part of a text: the best pair first, the leftmost of equals, until none is left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bpe_tables.hpp"

namespace cpt {

// Symbols up to which looking through them all again and again is faster than a heap.
inline constexpr std::size_t kShortPart = 48;

// Merges `count` symbols in place. `pairs` holds what each of them and the next become (tables.merged), and is
// used up. Returns how many symbols stay.
std::size_t merge_short(const BpeTables& tables, Symbol* symbols, Symbol* pairs, std::size_t count);

// The same for any number of symbols, in O(n log n). Keeps its memory for the next call, up to a bound.
class LongMerger {
 public:
  void merge(const BpeTables& tables, std::vector<Symbol>& symbols);

 private:
  void start(const BpeTables& tables, const std::vector<Symbol>& symbols);
  void pair_up(const BpeTables& tables, const std::vector<Symbol>& symbols, std::size_t left);

  std::vector<Symbol> pairs_;
  std::vector<std::uint32_t> next_;
  std::vector<std::uint32_t> previous_;
  std::vector<std::uint64_t> heap_;  // rank and place; an entry whose pair has changed since is passed over
};

}  // namespace cpt
