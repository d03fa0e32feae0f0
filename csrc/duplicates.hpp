// Near-duplicates among signed documents: keys of bands, joins of equal keys, connected components.
//
// A signed document is a row of 32-bit words. A band is a range of words; documents whose words agree in a
// whole band become a pair to be compared. Everything here is a pure function of the rows and the numbers
// of the documents, and a join reports enough pairs to connect what belongs together, so neither order nor
// division of the work changes the components.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "order.hpp"

namespace cpt {

struct Rows {
  const std::uint32_t* words;
  std::size_t count, width;

  const std::uint32_t* operator[](std::size_t row) const { return words + row * width; }
};

struct BandEntry {
  std::uint64_t key;
  std::int64_t document;

  bool operator<(const BandEntry& other) const {
    return key != other.key ? key < other.key : document < other.document;
  }
};

inline std::uint64_t band_key(const std::uint32_t* row, std::size_t begin, std::size_t end) {
  std::uint64_t key = 0;
  for (std::size_t k = begin; k < end; ++k) key = derive(key, row[k]);
  return key;
}

// Whether two rows are one text or nearly so: at least `needed` of words begin..end-1 are equal.
struct Likeness {
  std::size_t begin, end, needed;

  bool operator()(const std::uint32_t* a, const std::uint32_t* b) const {
    std::uint32_t equal = 0;
    for (std::size_t k = begin; k < end; ++k) equal += a[k] == b[k];
    return equal >= needed;
  }
};

// Documents of one key, and which of them hang together.
class Bucket {
 public:
  explicit Bucket(Likeness alike) : alike_(alike) {}

  // Compares with one component after the other, until it is met or passed over; add documents in rising order.
  template <typename Link>
  void add(std::int64_t document, const std::uint32_t* row, Link link) {
    std::size_t home = components_.size();
    for (std::size_t c = 0; c < components_.size();) {
      const auto met = std::find_if(components_[c].begin(), components_[c].end(),
                                    [&](const Member& member) { return alike_(member.row, row); });
      if (met == components_[c].end()) {
        ++c;
        continue;
      }
      link(met->document, document);
      if (home == components_.size()) {
        home = c++;
        continue;
      }
      components_[home].insert(components_[home].end(), components_[c].begin(), components_[c].end());
      components_.erase(components_.begin() + static_cast<std::ptrdiff_t>(c));
    }
    if (home == components_.size()) components_.emplace_back();
    components_[home].push_back({document, row});
  }

  void clear() { components_.clear(); }

 private:
  struct Member {
    std::int64_t document;
    const std::uint32_t* row;
  };

  Likeness alike_;
  std::vector<std::vector<Member>> components_;
};

// Calls link(lower, higher) for pairs of one key that are alike, enough to connect all such pairs; sorts `entries`.
// row_of(document) finds the row. Time: a comparison a document where the documents of a key hang together,
// their square where none do.
template <typename RowOf, typename Link>
void join_entries(std::vector<BandEntry>& entries, Likeness alike, RowOf row_of, Link link) {
  std::sort(entries.begin(), entries.end());
  Bucket bucket(alike);
  for (std::size_t first = 0, last; first < entries.size(); first = last) {
    last = first + 1;
    while (last < entries.size() && entries[last].key == entries[first].key) ++last;
    if (last - first == 1) continue;
    bucket.clear();
    for (std::size_t k = first; k < last; ++k) bucket.add(entries[k].document, row_of(entries[k].document), link);
  }
}

// Documents and what connects them; the root of a component is its lowest document.
class Components {
 public:
  explicit Components(std::size_t count) : parents_(count) {
    std::iota(parents_.begin(), parents_.end(), std::int64_t{0});
  }

  std::size_t size() const { return parents_.size(); }

  std::int64_t root(std::int64_t document) {
    while (parent(document) != document) document = parent(document) = parent(parent(document));
    return document;
  }

  void unite(std::int64_t a, std::int64_t b) {
    const auto [low, high] = std::minmax({root(a), root(b)});
    parent(high) = low;
  }

 private:
  std::int64_t& parent(std::int64_t document) { return parents_[static_cast<std::size_t>(document)]; }

  std::vector<std::int64_t> parents_;
};

}  // namespace cpt
