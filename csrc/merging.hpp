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

// The same for any number of symbols, in O(n log n) and less than 10 bytes a symbol, those of `symbols` included.
// The best of all pairs stands at the root of a tree of minima; its leaves are stretches of kLeaf places.
class LongMerger {
 public:
  // Keeps its memory for the next call, up to a bound.
  void merge(const BpeTables& tables, std::vector<Symbol>& symbols);

 private:
  static constexpr std::size_t kLeaf = 16;

  void start(const BpeTables& tables, const std::vector<Symbol>& symbols);
  std::size_t best() const;
  void merge_at(const BpeTables& tables, std::vector<Symbol>& symbols, std::size_t left);
  std::uint32_t least_of_leaf(std::size_t leaf) const;
  void renew_leaf(std::size_t leaf);

  std::vector<std::uint32_t> ranks_;  // of the pair that begins at each place; kNoSymbol: none does
  std::vector<std::uint32_t> least_;  // node 1 is the root, the leaves begin at leaves_
  std::size_t leaves_ = 0;
};

}  // namespace cpt
