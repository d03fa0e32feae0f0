#include "merging.hpp"

#include <algorithm>
#include <stdexcept>

namespace cpt {

namespace {

constexpr std::size_t kKeptSymbols = std::size_t{1} << 20;

std::uint32_t rank_of(const BpeTables& tables, Symbol pair) {
  return pair == kNoSymbol ? kNoSymbol : tables.rank(pair);
}

// A symbol of several characters stands at the place of the first; the second and the last say how many.
constexpr Symbol kInside = Symbol{1} << 31;
static_assert(MergeTable::kMaxSymbol < kInside);

std::size_t behind(const std::vector<Symbol>& symbols, std::size_t at) {
  const bool several = at + 1 < symbols.size() && (symbols[at + 1] & kInside);
  return at + (several ? symbols[at + 1] & ~kInside : 1);
}

}  // namespace

std::size_t merge_short(const BpeTables& tables, Symbol* symbols, Symbol* pairs, std::size_t count) {
  std::size_t best = 0;
  Symbol merged = count > 1 ? pairs[0] : kNoSymbol;
  for (std::size_t k = 1; k + 1 < count; ++k) {
    best = pairs[k] < merged ? k : best;
    merged = pairs[k] < merged ? pairs[k] : merged;
  }
  while (merged != kNoSymbol) {
    if (merged >= tables.first_tie()) {
      best = 0;
      while (rank_of(tables, pairs[best]) != tables.rank(merged)) ++best;
      merged = pairs[best];
    }
    symbols[best] = merged;
    --count;
    const std::size_t at = best;
    const Symbol on_left = at > 0 ? tables.merged(symbols[at - 1], merged) : kNoSymbol;
    const Symbol on_right = at + 1 < count ? tables.merged(merged, symbols[at + 2]) : kNoSymbol;
    // The best of the pairs that stay does not wait for the two loads above, and mostly it is the next one:
    // so the processor goes on with it, and the two branches below take it back where it was not.
    merged = kNoSymbol;
    for (std::size_t k = 0; k + 1 < at; ++k) {
      best = pairs[k] < merged ? k : best;
      merged = pairs[k] < merged ? pairs[k] : merged;
    }
    for (std::size_t k = at + 1; k < count; ++k) {
      symbols[k] = symbols[k + 1];
      if (k + 1 == count) break;
      pairs[k] = pairs[k + 1];
      best = pairs[k] < merged ? k : best;
      merged = pairs[k] < merged ? pairs[k] : merged;
    }
    if (at > 0) {
      pairs[at - 1] = on_left;
      if (__builtin_expect(on_left < merged, 0)) {
        merged = on_left;
        best = at - 1;
      }
    }
    if (at + 1 < count) {
      pairs[at] = on_right;
      if (__builtin_expect(on_right < merged, 0)) {
        merged = on_right;
        best = at;
      }
    }
  }
  return count;
}

void LongMerger::merge(const BpeTables& tables, std::vector<Symbol>& symbols) {
  start(tables, symbols);
  while (least_[1] != kNoSymbol) merge_at(tables, symbols, best());
  std::size_t kept = 0;
  for (std::size_t k = 0; k < symbols.size();) {
    const std::size_t next = behind(symbols, k);
    symbols[kept++] = symbols[k];
    k = next;
  }
  symbols.resize(kept);
  if (ranks_.capacity() > kKeptSymbols) *this = LongMerger();
}

void LongMerger::start(const BpeTables& tables, const std::vector<Symbol>& symbols) {
  const std::size_t count = symbols.size();
  if (count >= kInside) throw std::length_error("2^31 characters without a cut");
  const std::size_t leaves = (count + kLeaf - 1) / kLeaf;
  ranks_.assign(leaves * kLeaf, kNoSymbol);
  for (std::size_t k = 0; k + 1 < count; ++k) ranks_[k] = rank_of(tables, tables.merged(symbols[k], symbols[k + 1]));
  leaves_ = 1;
  while (leaves_ < leaves) leaves_ *= 2;
  least_.assign(2 * leaves_, kNoSymbol);
  for (std::size_t k = 0; k < leaves; ++k) least_[leaves_ + k] = least_of_leaf(k);
  for (std::size_t k = leaves_ - 1; k > 0; --k) least_[k] = std::min(least_[2 * k], least_[2 * k + 1]);
}

// The leftmost place of the best pair.
std::size_t LongMerger::best() const {
  const std::uint32_t rank = least_[1];
  std::size_t node = 1;
  while (node < leaves_) node = 2 * node + (least_[2 * node] != rank);
  std::size_t place = (node - leaves_) * kLeaf;
  while (ranks_[place] != rank) ++place;
  return place;
}

void LongMerger::merge_at(const BpeTables& tables, std::vector<Symbol>& symbols, std::size_t left) {
  const std::size_t right = behind(symbols, left);
  const std::size_t end = behind(symbols, right);
  const Symbol merged = tables.merged(symbols[left], symbols[right]);
  symbols[left] = merged;
  symbols[left + 1] = symbols[end - 1] = kInside | static_cast<Symbol>(end - left);
  ranks_[right] = kNoSymbol;
  ranks_[left] = end < symbols.size() ? rank_of(tables, tables.merged(merged, symbols[end])) : kNoSymbol;
  if (right / kLeaf != left / kLeaf) renew_leaf(right / kLeaf);
  if (left > 0) {
    const std::size_t before = left - ((symbols[left - 1] & kInside) ? symbols[left - 1] & ~kInside : 1);
    ranks_[before] = rank_of(tables, tables.merged(symbols[before], merged));
    if (before / kLeaf != left / kLeaf) renew_leaf(before / kLeaf);
  }
  renew_leaf(left / kLeaf);
}

std::uint32_t LongMerger::least_of_leaf(std::size_t leaf) const {
  const std::uint32_t* const ranks = ranks_.data() + leaf * kLeaf;
  std::uint32_t least = ranks[0];
  for (std::size_t k = 1; k < kLeaf; ++k) least = std::min(least, ranks[k]);
  return least;
}

void LongMerger::renew_leaf(std::size_t leaf) {
  std::size_t node = leaves_ + leaf;
  least_[node] = least_of_leaf(leaf);
  while (node > 1) {
    node /= 2;
    const std::uint32_t least = std::min(least_[2 * node], least_[2 * node + 1]);
    if (least_[node] == least) return;
    least_[node] = least;
  }
}

}  // namespace cpt
